"""The file of answers: whole lines from many processes, and nothing else believed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from core.errors import InvalidInput
from core.llm.cache import ReplyFile, Request
from core.llm.replies import Answer, Reply, Settings, Usage

SOURCE = {"model": "m", "base_url": "http://host/v1"}


def request(text="a", **settings):
    return Request(SOURCE, [{"role": "user", "content": text}], Settings(**settings))


def answer(text="b", **usage):
    return Answer((Reply(text, "stop", -1.5),), Usage(1, **usage))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "replies.jsonl"


def test_an_answer_comes_back_as_it_was_given(path):
    given = Answer((Reply('é\u2028\n"', "length", None), Reply("", "stop", -2.25)), Usage(1, 3, 7, None))
    asked = request("x\u2028y", n=2, temperature=0.5, stop=("\n",), seed=3)
    assert ReplyFile(path).get(asked) is None
    ReplyFile(path).add(asked, given)
    found = ReplyFile(path).get(asked)
    assert (found.replies, found.cached) == (given.replies, True)
    # How often it was tried is the story of that day, not of the answer.
    assert found.usage == Usage(1, 0, 7, None)
    assert [record[0] for record in ReplyFile(path).records()] == [asked]


def test_the_first_answer_stays(path):
    one, two = ReplyFile(path), ReplyFile(path)
    one.add(request(), answer("first"))
    assert two.add(request(), answer("second")).text == "first"
    assert len(path.read_text().splitlines()) == 1


def test_equal_numbers_are_equal_requests():
    assert request(temperature=1).key == request(temperature=1.0).key
    assert request(temperature=1).key != request(temperature=1.5).key


def test_an_open_file_sees_what_others_add(path):
    reader = ReplyFile(path)
    ReplyFile(path).add(request(), answer())
    assert reader.get(request()).text == "b"
    assert len(reader) == 1


def test_a_line_that_was_cut_off_is_dropped_and_costs_no_other(path):
    file = ReplyFile(path)
    file.add(request("a"), answer("1"))
    file.add(request("b"), answer("2"))
    whole = path.read_bytes()
    for missing in range(2, len(whole.splitlines()[1])):
        path.write_bytes(whole[:-missing])
        again = ReplyFile(path)
        assert (again.get(request("a")).text, again.get(request("b"))) == ("1", None)
    again.add(request("c"), answer("3"))
    assert [a.text for _, a in ReplyFile(path).records()] == ["1", "3"]


def test_a_last_line_without_its_end_counts_and_the_next_starts_on_its_own(path):
    ReplyFile(path).add(request("a"), answer("1"))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    file = ReplyFile(path)
    assert file.get(request("a")).text == "1"
    file.add(request("b"), answer("2"))
    assert [json.loads(line)["replies"][0]["text"] for line in path.read_text().splitlines()] == ["1", "2"]
    assert [a.text for _, a in file.records()] == ["1", "2"]


def test_a_file_that_was_removed_starts_anew(path):
    file = ReplyFile(path)
    file.add(request("a"), answer("1"))
    path.unlink()
    file.add(request("b"), answer("2"))
    assert b"\0" not in path.read_bytes()
    assert [a.text for _, a in ReplyFile(path).records()] == ["2"]


@pytest.mark.parametrize("content", ["hello", "hello\n", '{"a": 1}', '[1, 2]\n{"source": {}}\n', "\n\nnonsense\n"])
def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(InvalidInput, match=r"notes.txt, line \d: no recorded answer"):
        ReplyFile(path).add(request(), answer())
    assert path.read_text() == content


@pytest.mark.parametrize(
    "change",
    [{"replies": []}, {"replies": [{"text": 5}]}, {"settings": {"n": 0}}, {"usage": {"prompt": 1}}, {"extra": 1}],
)
def test_a_record_that_is_not_one_names_its_line(path, change):
    file = ReplyFile(path)
    file.add(request("a"), answer())
    file.add(request("b"), answer())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(line) for line in (lines[0], lines[1] | change)) + "\n")
    with pytest.raises(InvalidInput, match="line 2: no recorded answer"):
        ReplyFile(path)


def test_a_full_disk_leaves_whole_lines(path, monkeypatch):
    file = ReplyFile(path)
    file.add(request("a"), answer("1"))
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        file.add(request("b"), answer("2"))
    assert path.read_bytes() == before


def test_processes_that_write_at_once_lose_nothing(path):
    code = (
        "import sys; from core.llm.cache import ReplyFile, Request\n"
        "from core.llm.replies import Answer, Reply, Settings, Usage\n"
        "file = ReplyFile(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "for i in range(100):\n"
        "    text = f'{sys.argv[2]}-{i}' if i % 2 else f'shared-{i}'\n"
        "    request = Request({'model': 'm'}, [{'role': 'user', 'content': text}], Settings())\n"
        "    file.add(request, Answer((Reply(text * 500),), Usage(1)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, path, str(i)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(3)
    ]
    assert [child.stdout.readline() for child in children] == ["ready\n"] * 3
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    assert [child.wait() for child in children] == [0, 0, 0]
    for child in children:
        child.stdin.close()
        child.stdout.close()
    texts = [r.messages[0]["content"] for r, _ in ReplyFile(path).records()]
    assert len(texts) == len(set(texts)) == 50 + 3 * 50
    assert len(path.read_text().splitlines()) == 200
