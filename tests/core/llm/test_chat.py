"""Chats with a server that misbehaves, with a local model and with a recording; and what is read out of replies."""

from __future__ import annotations

import asyncio
import copy
import email.utils
import importlib.util
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from enum import Enum
from pathlib import Path

import pytest
from pydantic import BaseModel

from core.errors import CannotRunHere, DataUnavailable, InvalidInput, MissingExtra, TenfoldError
from core.llm import base
from core.llm.chat import (
    Answer,
    Chat,
    ChatError,
    ChatRefused,
    ChatUnavailable,
    Patience,
    Prices,
    Reply,
    Settings,
    UnknownRequest,
    UnparsedReply,
    Usage,
    load_chat,
    parse,
)
from core.llm.local import LocalChat
from core.progress import set_sink

_spec = importlib.util.spec_from_file_location("chat_server", Path(__file__).with_name("server.py"))
misbehave = importlib.util.module_from_spec(_spec)
sys.modules["chat_server"] = misbehave
_spec.loader.exec_module(misbehave)

KEY = "sk-secret-0123456789abcdef"
QUICK = Patience(max_retries=3, timeout=20, total_timeout=60, backoff=0.01, max_backoff=0.05)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with misbehave.serving() as running:
        yield running


def connect(server, **options):
    return load_chat(f"openai:tiny@{server.url}", **{"patience": QUICK, **options})


def say(text, system=None):
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": text}]


# What is asked and what comes back.


def test_a_conversation_gives_an_answer_with_its_samples_in_order_and_their_tokens_and_cost(server):
    chat = connect(server, prices=Prices(prompt=1_000_000, completion=500_000))
    answer = chat.complete(say("which", system="Be short."), n=3, temperature=0.7, seed=4, max_tokens=9)
    assert [reply.text for reply in answer.replies] == [f"which sample {i} seed 4" for i in range(3)]
    assert answer.text == "which sample 0 seed 4"
    assert answer.usage == Usage(requests=1, retries=0, prompt_tokens=5, completion_tokens=6, cost=5 + 3)
    assert not answer.cached
    assert server.bodies == [
        {
            "model": "tiny",
            "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "which"}],
            "temperature": 0.7,
            "max_tokens": 9,
            "n": 3,
            "seed": 4,
        }
    ]


def test_only_settings_that_differ_from_the_servers_defaults_are_sent(server):
    connect(server).complete(say("a"), temperature=1.0, top_p=0.5, stop=["\n", "END"], log_probs=True)
    assert server.bodies[0].keys() == {"model", "messages", "temperature", "max_tokens", "top_p", "stop", "logprobs"}
    assert server.bodies[0]["stop"] == ["\n", "END"]


def test_openai_itself_gets_the_limit_under_the_name_that_its_newer_models_take():
    from core.llm.wire import payload

    assert payload("gpt", say("a"), Settings(), openai_itself=True)["max_completion_tokens"] == 512
    assert "max_tokens" not in payload("gpt", say("a"), Settings(), openai_itself=True)


def test_log_probs_and_finish_reasons_are_the_servers(server):
    chat = connect(server)
    assert chat.complete(say("a"), log_probs=True).replies[0] == Reply("a sample 0 seed None", "stop", -0.75)
    assert chat.complete(say("a"), max_tokens=1).replies[0].finish_reason == "length"
    assert chat.complete(say("a")).replies[0].log_prob is None


def test_a_refusal_an_empty_reply_and_a_broken_character_are_replies(server):
    server.script.append(
        misbehave.body_of(
            '{"choices": [{"message": {"content": null, "refusal": "I will not."}, "finish_reason": "stop"}]}'
        )
    )
    server.script.append(
        misbehave.body_of('{"choices": [{"message": {"content": null}, "finish_reason": "content_filter"}]}')
    )
    server.script.append(misbehave.body_of('{"choices": [{"message": {"content": "a\\ud800"}}]}'))
    chat = connect(server)
    assert chat.complete(say("a")).replies == (Reply("I will not.", "refusal"),)
    assert chat.complete(say("b")).replies == (Reply("", "content_filter"),)
    assert chat.complete(say("c")).replies == (Reply("a?", "unknown"),)


def test_many_conversations_are_answered_in_their_order_whatever_the_order_of_arrival(server):
    server.script.extend(misbehave.slow(seconds) for seconds in (0.3, 0.2, 0.1, 0))
    answers = connect(server).complete([say(word) for word in "abcdefgh"])
    assert [answer.text[0] for answer in answers] == list("abcdefgh")
    assert connect(server).complete([]) == []


def test_the_limit_of_open_requests_is_reached_and_never_passed(server):
    server.default = misbehave.slow(0.05)
    connect(server, max_concurrency=3).complete([say(str(i)) for i in range(12)])
    assert server.most_open == 3
    assert len(server.bodies) == 12


def test_equal_conversations_of_one_call_are_asked_once(server):
    chat = connect(server)
    answers = chat.complete([say("a"), say("b"), say("a")])
    assert sorted(server.questions) == ["a", "b"]
    assert answers[0] == answers[2]
    assert chat.usage.requests == 2


def test_a_server_that_ignores_n_is_asked_for_the_rest_with_other_seeds(server):
    server.default = misbehave.few(1)
    answer = connect(server).complete(say("a"), n=3, temperature=1.0, seed=10)
    assert [reply.text for reply in answer.replies] == [f"a sample 0 seed {seed}" for seed in (10, 11, 12)]
    assert answer.usage == Usage(requests=1, prompt_tokens=3, completion_tokens=6, cost=None)
    server.default = misbehave.few(5)
    assert len(connect(server).complete(say("b"), n=3, temperature=1.0).replies) == 3


def test_a_server_that_does_not_count_leaves_tokens_and_cost_unknown(server):
    server.script.append(misbehave.uncounted)
    chat = connect(server, prices=Prices(1, 1))
    chat.complete([say("a"), say("b")])
    assert (chat.usage.requests, chat.usage.prompt_tokens, chat.usage.cost) == (2, None, None)


# What goes wrong on the way.


@pytest.mark.parametrize(
    ("trouble", "named"),
    [
        (misbehave.fail(500), "HTTP 500"),
        (misbehave.fail(503, "<html>busy</html>", Content_Type="text/html"), "HTTP 503"),
        (misbehave.fail(429), "HTTP 429"),
        (misbehave.fail(408), "HTTP 408"),
        (misbehave.cut, "RemoteProtocolError"),
        (misbehave.cut_chunked, "RemoteProtocolError"),
        (misbehave.hang_up, "RemoteProtocolError"),
        (misbehave.body_of("{not json"), "no chat completion"),
        (misbehave.body_of("[" * 50_000), "no chat completion"),
        (misbehave.body_of('{"error": {"message": "upstream"}}'), "no chat completion: .*upstream"),
        (misbehave.body_of('{"choices": []}'), "no chat completion"),
        (misbehave.body_of('{"choices": [{"message": {"content": 5}}]}'), "no chat completion"),
        (misbehave.body_of("\udcff\udcfe"), "no chat completion"),
        (misbehave.body_of("<html>Sign in</html>", Content_Type="text/html"), "type text/html instead of JSON"),
        (misbehave.body_of("garbage", Content_Encoding="gzip"), "DecodingError"),
    ],
)
def test_trouble_that_may_pass_is_met_with_another_attempt_and_ends_by_naming_it(server, trouble, named):
    server.script.extend([trouble, trouble])
    chat = connect(server)
    assert chat.complete(say("a")).text == "a sample 0 seed None"
    assert len(server.bodies) == 3
    assert (chat.spent.requests, chat.spent.retries) == (1, 2)

    server.default = trouble
    with pytest.raises(ChatUnavailable, match=rf"(?s)Asked tiny at {server.url} .*'b'.*attempt 4 failed.*{named}"):
        chat.complete(say("b"))
    assert server.questions == ["a"] * 3 + ["b"] * 4


def test_a_slow_answer_and_one_that_drips_for_ever_end_at_the_time_out(server):
    server.script.extend([misbehave.slow(5), misbehave.drip(20)])
    start = time.monotonic()
    patience = Patience(timeout=0.7, backoff=0.01)
    assert connect(server, patience=patience).complete(say("a")).usage.retries >= 2
    assert 1.4 <= time.monotonic() - start < 15


def test_the_total_time_out_ends_a_request_before_its_retries_do(server):
    server.default = misbehave.slow(30)
    start = time.monotonic()
    patience = Patience(max_retries=100, timeout=0.2, total_timeout=0.7, backoff=0.01)
    with pytest.raises(ChatUnavailable, match=r"no whole answer within .*total_timeout=0.7 s"):
        connect(server, patience=patience).complete(say("a"))
    assert time.monotonic() - start < 10
    assert len(server.bodies) <= 5


def test_waits_double_up_to_a_bound_and_jitter_shortens_them_by_at_most_half():
    patience = Patience(backoff=1, max_backoff=5)
    waits = [[patience.wait(attempt) for _ in range(200)] for attempt in range(5)]
    for drawn, longest in zip(waits, (1, 2, 4, 5, 5), strict=True):
        assert longest / 2 <= min(drawn) < 0.6 * longest
        assert 0.9 * longest < max(drawn) <= longest


def test_retry_after_is_honoured_by_every_request_of_the_call(server):
    server.script.append(misbehave.fail(429, Retry_After="0.6"))
    chat = connect(server, max_concurrency=1, patience=QUICK)
    chat.complete(say("a"))
    assert server.times[1] - server.times[0] >= 0.6

    server.times.clear()
    server.script.extend([misbehave.fail(429, Retry_After="0.6"), misbehave.slow(0.1)])
    connect(server, max_concurrency=2).complete([say(word) for word in "abcd"])
    first = server.times[0]
    assert sum(moment - first < 0.55 for moment in server.times) <= 2
    assert len(server.times) == 5


def test_retry_after_is_read_in_seconds_in_milliseconds_and_as_a_date():
    from core.llm.wire import retry_after

    assert retry_after({"retry-after": "2"}) == 2
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert 28 < retry_after({"retry-after": email.utils.formatdate(time.time() + 30)}) <= 31
    for useless in ({}, {"retry-after": "soon"}, {"retry-after": "-3"}, {"retry-after": "nan"}, {"retry-after": "inf"}):
        assert retry_after(useless) == 0
    assert retry_after({"retry-after": email.utils.formatdate(0)}) == 0


def test_a_wait_longer_than_the_time_left_ends_the_request_at_once(server):
    server.script.append(misbehave.fail(429, Retry_After="3600"))
    start = time.monotonic()
    with pytest.raises(ChatUnavailable, match=r"HTTP 429.*no time to wait another 3.6e\+03 s"):
        connect(server).complete(say("a"))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("status", "text", "advice"),
    [
        (400, '{"error": {"message": "context length is 8"}}', "context length is 8.*smaller max_tokens"),
        (401, "{}", "Check the key"),
        (403, "{}", "may not use this model"),
        (404, "{}", "usually ends in /v1"),
        (429, '{"error": {"code": "insufficient_quota"}}', "no quota left"),
    ],
)
def test_a_refusal_is_not_tried_again(server, status, text, advice):
    server.default = misbehave.fail(status, text)
    with pytest.raises(ChatRefused, match=rf"(?s)'a': the server refused with HTTP {status}.*{advice}") as caught:
        connect(server).complete(say("a"))
    assert caught.value.status == status
    assert len(server.bodies) == 1
    again = copy.deepcopy(caught.value)
    assert (str(again), again.status) == (str(caught.value), status)


def test_a_server_that_is_not_there_is_named_and_makes_a_claim_not_run():
    with pytest.raises(CannotRunHere, match=r"http://127.0.0.1:9/v1.*ConnectError.*Check that the server runs"):
        load_chat("openai:m@http://127.0.0.1:9/v1", patience=QUICK).complete(say("a"))


def test_a_failure_lets_open_requests_end_and_starts_no_new_ones(server, tmp_path):
    server.script.extend([misbehave.slow(0.3), misbehave.fail(400)])
    chat = connect(server, max_concurrency=2, cache=tmp_path / "replies.jsonl")
    with pytest.raises(ChatRefused) as caught:
        chat.complete([say(word) for word in "abcdef"])
    assert len(server.bodies) == 2
    assert "1 of 6 answers are in" in caught.value.__notes__[0]

    chat.complete([say(word) for word in "abcdef"])
    refused = server.questions[1] if server.questions[1] == "b" else "a"
    assert sorted(server.questions) == sorted([*"abcdef", refused])


def test_a_failure_wakes_requests_that_wait_for_their_next_attempt(server):
    server.script.extend([misbehave.fail(500), misbehave.fail(400)])
    start = time.monotonic()
    with pytest.raises(ChatError):
        connect(server, max_concurrency=2, patience=Patience(backoff=30)).complete([say("a"), say("b")])
    assert time.monotonic() - start < 12


def test_a_caller_with_an_event_loop_of_its_own_is_served(server):
    async def notebook():
        return connect(server).complete(say("a")).text

    assert asyncio.run(notebook()) == "a sample 0 seed None"


def test_retries_are_reported_while_they_happen(server, caplog):
    server.script.append(misbehave.fail(500))
    with caplog.at_level(logging.WARNING, "core.llm.remote"):
        connect(server).complete(say("a"))
    assert "attempt 1 failed with HTTP 500" in caplog.text


# Interruptions, and the cache.


def test_a_call_killed_midway_goes_on_without_asking_anything_twice(server, tmp_path):
    code = (
        "import sys; from core.llm.chat import load_chat\n"
        "chat = load_chat(sys.argv[1], cache=sys.argv[2], max_concurrency=1)\n"
        "chat.complete([[{'role': 'user', 'content': word}] for word in 'abcdef'])"
    )
    file = tmp_path / "replies.jsonl"
    server.script.extend([misbehave.good] * 3 + [misbehave.slow(30)])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    child = subprocess.Popen([sys.executable, "-c", code, f"openai:tiny@{server.url}", file], env=environment)
    try:
        while len(server.bodies) < 4:
            assert child.poll() is None
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert server.questions == list("abcd")
    chat = connect(server, cache=file)
    answers = chat.complete([say(word) for word in "abcdef"])
    # The fourth was open when the process died, so nobody knows its answer.
    assert server.questions[:4] == list("abcd")
    assert sorted(server.questions[4:]) == list("def")
    assert [answer.cached for answer in answers] == [True] * 3 + [False] * 3
    assert (chat.usage.requests, chat.spent.requests) == (6, 3)


def test_an_interrupt_cancels_what_is_open_at_once(server, monkeypatch):
    server.default = misbehave.slow(20)
    # A shell starts what it puts in the background with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            connect(server, patience=Patience()).complete([say("a"), say("b")])
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 15


def test_an_answer_that_cannot_be_stored_stops_the_asking(server, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    server.default = misbehave.slow(0.1)
    with pytest.raises(OSError, match="No space") as kept:
        connect(server, cache=tmp_path / "replies.jsonl", max_concurrency=1).complete([say(str(i)) for i in range(20)])
    assert kept.tb is not None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("asking")]
    assert len(server.bodies) < 5


def test_long_work_shows_how_far_it_is_and_short_work_is_silent(monkeypatch):
    events = []
    set_sink(events.append)
    try:
        clock = iter([0.0, 1.0, *[2.0] * 20])
        monkeypatch.setattr(base.time, "monotonic", lambda: next(clock))
        assert [i for i, _ in base._watched(iter([(i, None) for i in range(6)]), 6, "Asking m")] == list(range(6))
        assert (events[0].description, events[0].completed, events[-1].completed) == ("Asking m", 0, 6)
        events.clear()
        clock = iter([0.0, *[0.1] * 20])
        list(base._watched(iter([(i, None) for i in range(6)]), 6, "Asking m"))
        assert not events
    finally:
        set_sink(None)


def test_samples_at_a_temperature_are_those_of_the_first_time(server, tmp_path):
    file = tmp_path / "replies.jsonl"
    ask = {"n": 2, "temperature": 0.9}
    first = connect(server, cache=file).complete(say("a"), **ask)
    again = connect(server, cache=file).complete(say("a"), **ask)
    assert again.replies == first.replies
    assert (first.cached, again.cached) == (False, True)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"n": 3},
        {"temperature": 0.8},
        {"top_p": 0.9},
        {"max_tokens": 7},
        {"stop": ["."]},
        {"seed": 1},
        {"log_probs": True},
    ],
)
def test_every_setting_is_part_of_the_request(server, tmp_path, change):
    chat = connect(server, cache=tmp_path / "replies.jsonl")
    base = {"n": 2, "temperature": 0.9}
    chat.complete(say("a"), **base)
    chat.complete(say("a"), **{**base, **change})
    assert len(server.bodies) == 2


def test_the_model_the_server_and_the_role_are_part_of_the_request(server, tmp_path):
    file = tmp_path / "replies.jsonl"
    connect(server, cache=file).complete(say("a"))
    connect(server, cache=file).complete([{"role": "assistant", "content": "a"}])
    load_chat(f"openai:other@{server.url}", cache=file).complete(say("a"))
    assert len(server.bodies) == 3
    with misbehave.serving() as second:
        connect(second, cache=file).complete(say("a"))
        assert len(second.bodies) == 1


def test_a_chat_sums_what_it_used_and_what_it_spent(server, tmp_path):
    file = tmp_path / "replies.jsonl"
    connect(server, cache=file).complete(say("abc"))
    chat = connect(server, cache=file, prices=Prices(prompt=2e6, completion=1e6))
    chat.complete([say("abc"), say("de")])
    assert chat.usage == Usage(requests=2, prompt_tokens=5, completion_tokens=4, cost=14)
    assert chat.spent == Usage(requests=1, prompt_tokens=2, completion_tokens=2, cost=6)


# The key.


def test_the_key_reaches_the_server_and_nothing_else(server, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    file = tmp_path / "replies.jsonl"
    chat = connect(server, cache=file)
    server.script.append(misbehave.echo_key(500))
    server.script.append(misbehave.body_of(f'{{"choices": [{{"message": {{"content": "{KEY}"}}}}]}}'))
    with caplog.at_level(logging.DEBUG):
        assert chat.complete(say("a")).text == "[key]"
        shown = [repr(chat), str(vars(chat))]
        for status in (401, 500):
            server.default = misbehave.echo_key(status)
            with pytest.raises(ChatError) as caught:
                chat.complete(say(f"b{status}"))
            shown += traceback.format_exception(caught.value)
        server.default = misbehave.body_of(f"{'x' * 290}{KEY}", Content_Type="text/plain")
        with pytest.raises(ChatUnavailable) as caught:
            chat.complete(say("c"))
        shown += traceback.format_exception(caught.value)
    assert set(server.keys) == {f"Bearer {KEY}"}
    disk = "".join(path.read_text() for path in tmp_path.iterdir())
    assert file.is_file()
    everything = "".join(shown) + caplog.text + disk
    # Not even the half that a shortened message would leave.
    assert KEY[:9] not in everything
    assert "[key]" in everything


def test_the_key_of_an_argument_wins_and_is_not_pickled(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    chat = connect(server, api_key=KEY)
    chat.complete(say("a"))
    assert server.keys == [f"Bearer {KEY}"]
    with pytest.raises(InvalidInput, match="set OPENAI_API_KEY"):
        pickle.dumps(chat)
    handed_over = copy.deepcopy(connect(server))
    handed_over.complete(say("a"))
    assert server.keys[1] == "Bearer from-the-environment"


def test_a_key_with_a_line_break_is_refused_without_being_shown(server):
    with pytest.raises(InvalidInput, match="a line break") as caught:
        connect(server, api_key=f"{KEY}\n")
    assert KEY not in str(caught.value)


def test_openai_itself_needs_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ChatUnavailable, match="set OPENAI_API_KEY"):
        load_chat("openai:gpt-4o")
    assert load_chat("openai:gpt-4o", api_key=KEY).source == {
        "model": "gpt-4o",
        "base_url": "https://api.openai.com/v1",
    }


# Specs and bad input.


def test_model_names_may_hold_colons_and_at_signs():
    chat = load_chat("openai:library/llama3:8b@q4@http://localhost:1/v1/")
    assert chat.source == {"model": "library/llama3:8b@q4", "base_url": "http://localhost:1/v1"}


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("opnai:gpt-4o", {}, "Did you mean openai"),
        ("openai:", {}, "names no model"),
        ("openai:m@http://user:hidden@host/v1", {}, "no user name, password"),
        ("openai:m@http:///v1", {}, "is like http://127.0.0.1:8000/v1"),
        ("openai:m@http://host/v1", {"max_concurency": 3}, "Did you mean max_concurrency"),
        ("openai:m@http://host/v1", {"max_concurrency": 0}, "at least 1"),
        ("testbed:tiny_llama", {"patience": QUICK}, "Unknown option of testbed: 'patience'"),
    ],
)
def test_a_wrong_spec_or_option_is_named(spec, options, message):
    with pytest.raises(InvalidInput, match=message) as caught:
        load_chat(spec, **options)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "settings", "message"),
    [
        ([[]], {}, "at least one message"),
        ([{"role": "user"}], {}, "A message is"),
        ([{"role": "user", "content": "a", "name": "b"}], {}, "A message is"),
        ([{"role": "robot", "content": "a"}], {}, "Unknown role of a message 'robot'"),
        ([{"role": "user", "content": "\ud800"}], {}, "surrogate"),
        (say("a"), {"n": 0}, "n >= 1"),
        (say("a"), {"n": 2}, "Temperature 0 gives one reply"),
        (say("a"), {"top_p": 0.5}, "Temperature 0 gives one reply"),
        (say("a"), {"temperature": float("nan")}, "temperature >= 0"),
        (say("a"), {"temperature": float("inf")}, "temperature >= 0"),
        (say("a"), {"max_tokens": 0}, "max_tokens >= 1"),
        (say("a"), {"stop": [""]}, "Stop strings"),
        (say("a"), {"stop": "END"}, "Stop strings"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_asked(server, messages, settings, message):
    with pytest.raises(InvalidInput, match=message):
        connect(server).complete(messages, **settings)
    assert not server.bodies


def test_a_bare_text_is_no_list_of_messages(server):
    # Past the type checker of the tests, which users do not have.
    with pytest.raises(InvalidInput, match="Messages are a list"):
        Chat.complete.__wrapped__(connect(server), "text")


def test_patience_needs_times_above_zero():
    with pytest.raises(InvalidInput, match="times above 0"):
        Patience(timeout=0)


def test_without_the_library_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingExtra, match="pip install"):
        load_chat("openai:m@http://host/v1")


def test_importing_the_module_loads_neither_torch_nor_the_client():
    code = (
        "import sys, core.llm.chat; print([m for m in ('torch', 'openai', 'transformers', 'jax') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_chat_of_ones_own_has_the_cache_and_the_sums(tmp_path):
    class Shouting(Chat):
        source = {"model": "shouting"}  # noqa: RUF012
        asked = 0

        def answers(self, conversations, settings):
            for i, conversation in enumerate(conversations):
                self.asked += 1
                yield i, Answer((Reply(conversation[-1]["content"].upper()),), Usage(1, 0, 2, 1))

    chat = Shouting(cache=tmp_path / "replies.jsonl", prices=Prices(1e6, 1e6))
    assert [answer.text for answer in chat.complete([say("a"), say("b")])] == ["A", "B"]
    assert chat.complete(say("b")).text == "B"
    assert (chat.asked, chat.spent, chat.usage) == (2, Usage(2, 0, 4, 2, 6), Usage(3, 0, 6, 3, 9))


# Local models.


@pytest.fixture(scope="module")
def templated(request):
    lm = request.getfixturevalue("llama")
    lm.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    yield lm
    lm.tokenizer.chat_template = None


def test_a_local_model_is_asked_through_its_template(templated):
    answer = LocalChat(templated).complete(say("the array"), max_tokens=12)
    expected = templated.generate(["[user] the array\n[assistant]"], max_new_tokens=12)[0][0]
    assert (answer.text, answer.replies[0].log_prob) == (expected.text, expected.log_prob)
    prompt = len(templated.encode("[user] the array\n[assistant]"))
    assert answer.usage == Usage(1, 0, prompt, len(expected.token_ids), None)


def test_the_template_writes_the_start_token_and_the_tokenizer_does_not_write_it_again(with_start_token, monkeypatch):
    monkeypatch.setattr(with_start_token.tokenizer, "chat_template", "<start>{{ messages[0].content }}")
    prompts = []
    monkeypatch.setattr(
        with_start_token,
        "generate",
        lambda ids, **rest: prompts.extend(ids) or type(with_start_token).generate(with_start_token, ids, **rest),
    )
    LocalChat(with_start_token).complete(say("value"), max_tokens=2)
    assert prompts[0].count(1) == 1
    assert 0 not in prompts[0]


def test_a_batch_of_local_samples_is_what_each_conversation_gives_alone(gpt2):
    # Batches of one conversation, of several, and a list in an order that the batches do not follow.
    ask = {"n": 2, "temperature": 1.0, "top_p": 0.9, "max_tokens": 6, "seed": 3}
    conversations = [say("the value"), say("return the value of the array in the order"), say("of")]
    alone = [LocalChat(gpt2).complete(conversation, **ask) for conversation in conversations]
    for budget in (1, 120, 8192):
        together = LocalChat(gpt2, max_batch_tokens=budget).complete(conversations, **ask)
        assert [[r.text for r in a.replies] for a in together] == [[r.text for r in a.replies] for a in alone]
        assert [a.usage for a in together] == [a.usage for a in alone]
    assert len({reply.text for answer in alone for reply in answer.replies}) == 6


def test_without_a_template_a_conversation_is_plain_text_that_ends_with_the_assistant(gpt2):
    answer = LocalChat(gpt2).complete(say("which", system="Be short."), max_tokens=5)
    prompt = "System: Be short.\n\nUser: which\n\nAssistant:"
    assert answer.text == gpt2.generate([prompt], max_new_tokens=5)[0][0].text.removeprefix(" ")
    assert answer.usage.prompt_tokens == len(gpt2.encode(prompt))


def test_local_finish_reasons_tell_a_stop_string_from_the_limit(gpt2):
    chat = LocalChat(gpt2)
    whole = chat.complete(say("which"), max_tokens=10)
    assert whole.replies[0].finish_reason == "length"
    stop = whole.text[3:5]
    cut = chat.complete(say("which"), max_tokens=10, stop=[stop])
    assert cut.replies[0].finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    exact = chat.complete(say("which"), max_tokens=cut.usage.completion_tokens, stop=[stop])
    assert (exact.text, exact.replies[0].finish_reason) == (cut.text, "stop")


def test_without_a_template_the_users_next_turn_ends_the_reply(gpt2, monkeypatch):
    stops, generate = [], gpt2.generate
    monkeypatch.setattr(gpt2, "generate", lambda ids, **rest: stops.append(rest["stop"]) or generate(ids, **rest))
    LocalChat(gpt2).complete(say("which"), max_tokens=2, stop=["."])
    assert stops == [(".", "\n\nUser:")]


def test_a_conversation_that_does_not_fit_or_suit_the_template_is_refused_before_work(templated):
    with pytest.raises(InvalidInput, match=r"no system role.*Roles: system, user"):
        LocalChat(templated).complete(say("a", system="b"), max_tokens=5)
    with pytest.raises(
        InvalidInput, match=r"A conversation of \d+ tokens and max_tokens=50 do not fit.* at most 96 tokens"
    ):
        LocalChat(templated).complete([say("a"), say("value " * 40)], max_tokens=50)


def test_local_answers_are_cached_by_weights_and_template(gpt2, tmp_path, monkeypatch):
    file = tmp_path / "replies.jsonl"
    chat = LocalChat(gpt2, cache=file)
    chat.complete(say("a"), max_tokens=3)
    assert LocalChat(gpt2, cache=file).complete(say("a"), max_tokens=3).cached
    monkeypatch.setattr(gpt2.tokenizer, "chat_template", "{{ messages[0].content }}")
    assert not LocalChat(gpt2, cache=file).complete(say("a"), max_tokens=3).cached


def test_the_testbed_answers_by_its_spec():
    chat = load_chat("testbed:tiny_llama", device="cpu")
    answers = chat.complete([say("Return the"), say("array")], max_tokens=16)
    assert all(answer.usage.completion_tokens for answer in answers)
    assert chat.source["model"].startswith("testbed:tiny_llama?seed=0")


# Recordings.


def record(server, file):
    chat = connect(server, cache=file)
    chat.complete([say("which table", system="Be short."), say("how many")], temperature=0.5, seed=1)
    chat.complete(say("x"), max_tokens=9)
    server.bodies.clear()


def test_a_recording_answers_without_the_model(server, tmp_path):
    file = tmp_path / "replies.jsonl"
    record(server, file)
    chat = load_chat(f"replay:{file}", prices=Prices(1e6, 1e6))
    answers = chat.complete([say("how many"), say("which table", system="Be short.")], temperature=0.5, seed=1)
    assert [answer.text for answer in answers] == ["how many sample 0 seed 1", "which table sample 0 seed 1"]
    assert chat.usage == Usage(2, 0, 19, 4, 23)
    assert chat.spent == Usage()
    assert not server.bodies


@pytest.mark.parametrize(
    ("messages", "settings", "difference"),
    [
        (say("how many"), {"temperature": 0.7, "seed": 1}, r"differs: temperature is 0.7 here, 0.5 there\."),
        (say("how many"), {"temperature": 0.5, "seed": 2}, r"differs: seed is 2 here, 1 there\."),
        (
            say("which fable", system="Be short."),
            {"temperature": 0.5, "seed": 1},
            r"differs: message 1 \(user\) from character 6 on is 'fable' here, 'table' there\.",
        ),
        (say("which table"), {"temperature": 0.5, "seed": 1}, "the messages are of user here, of system, user there"),
    ],
)
def test_an_unknown_request_is_refused_with_the_nearest_difference(server, tmp_path, messages, settings, difference):
    file = tmp_path / "replies.jsonl"
    record(server, file)
    with pytest.raises(UnknownRequest, match=rf"no answer to this request among 3; .*{difference}"):
        load_chat(f"replay:{file}").complete(messages, **settings)
    assert not server.bodies


def test_a_recording_of_several_models_needs_the_name_of_one(server, tmp_path):
    file = tmp_path / "replies.jsonl"
    record(server, file)
    load_chat(f"openai:other@{server.url}", cache=file).complete(say("how many"))
    with pytest.raises(InvalidInput, match="holds answers of other, tiny"):
        load_chat(f"replay:{file}")
    assert load_chat(f"replay:{file}", model="other").complete(say("how many")).text == "how many sample 0 seed None"
    with pytest.raises(UnknownRequest, match="temperature"):
        load_chat(f"replay:{file}", model="tiny").complete(say("how many"))


def test_a_recording_that_is_not_there_says_how_to_make_one(tmp_path):
    with pytest.raises(DataUnavailable, match="Record them with"):
        load_chat(f"replay:{tmp_path / 'nothing.jsonl'}")


# Objects in replies.


class Kind(Enum):
    CLICK = "click"
    TYPE = "type"


class Action(BaseModel):
    kind: Kind
    target: int
    text: str = ""


CLICK = Action(kind=Kind.CLICK, target=5)


@pytest.mark.parametrize(
    "text",
    [
        '{"kind": "click", "target": 5}',
        'I will click.\n```json\n{"kind": "click",\n "target": 5}\n```\nDone.',
        'Use {name} and [1], so: {"kind": "click", "target": "5"} or {"kind": "type", "target": 6}',
        '<think>{"kind": "type", "target": 1}</think>{"kind": "click", "target": 5}',
        'thought {"kind": "type", "target": 1} </think> {"kind": "click", "target": 5}',
        'Wrong is {"kind": "type", "target": 9}.\n```\n{"kind": "click", "target": 5}\n```',
        'In LaTeX \\[ x \\{ y: {"kind": "click", "target": 5, "text": ""}',
    ],
)
def test_the_object_is_found_where_models_put_it(text):
    assert parse(text, Action) == CLICK
    assert parse(Reply(text), Action) == CLICK


def test_text_with_brackets_quotes_and_escapes_is_read_whole():
    action = Action(kind=Kind.TYPE, target=1, text='a } ] { "quoted" \\ \n ```json é')
    assert parse(f"Here: {action.model_dump_json()} and {{more}}", Action) == action


def test_a_list_is_read_as_a_list():
    text = 'Given [the page], do [{"kind": "click", "target": 5}, {"kind": "type", "target": 2}]'
    assert [action.target for action in parse(text, list[Action])] == [5, 2]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "There is no JSON for Action"),
        ("I cannot do that.", "There is no JSON for Action"),
        ('{"kind": "click"}', "Field required at `target`"),
        ('{"kind": "fly", "target": 5}', "at `kind`"),
        ('{"kind": "click", "target": 5', "no valid JSON"),
        # What stands inside a broken or foreign value is not the answer.
        ('[{"kind": "click", "target": 5}, {"kind":', "no valid JSON"),
        ('{"a": {"kind": "click", "target": 5}, }', "no valid JSON"),
        ('{"not": {"kind": "click", "target": 5}}', "Field required"),
        ('<think>{"kind": "click", "target": 5}', "There is no JSON"),
        ("{'kind': 'click', 'target': __import__('os').getpid()}", "no valid JSON"),
        ('{"kind": "click", "target": NaN}', "NaN is not JSON"),
        ('{"kind": "click", "target": ' + "9" * 10_000 + "}", "no valid JSON"),
        ('{"kind": "click", "target": 5, "text": "\\ud800"}', "no Action|no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
        ("[" * 100_000 + "]" * 100_000, "no valid JSON"),
        ("{}" * 20_000, "Field required"),
        ("```" * 50_000, "There is no JSON"),
        ("```json\n" * 20_000, "There is no JSON"),
        ("{x}" * 50_000, "no valid JSON"),
    ],
)
def test_a_reply_without_the_object_is_an_error_that_a_method_can_send_back(text, problem):
    start = time.process_time()
    with pytest.raises(UnparsedReply, match=problem) as caught:
        parse(text, Action)
    assert time.process_time() - start < 5
    assert caught.value.text == text
    assert len(str(caught.value)) < 1200
    assert isinstance(caught.value, TenfoldError)
    again = copy.deepcopy(caught.value)
    assert (str(again), again.problem) == (str(caught.value), caught.value.problem)


def test_a_reply_that_was_cut_off_says_so():
    with pytest.raises(UnparsedReply, match="cut off by max_tokens"):
        parse(Reply('{"kind": "cl', "length"), Action)
