"""A transformer as stacks of blocks that can be run one at a time (reference 10).

The arguments of every block are recorded once a batch, and the hidden states are kept between blocks, so that a block can
be run again with other weights and nothing else of the model needs to be in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from core.errors import InvalidInput
from core.progress import track
from sparsity24.capture import Use, WeightWatch
from sparsity24.prox import all_finite
from sparsity24.weights import WeightRef, check_finite, expanded, matrices

Blocks = dict[str, nn.Module]


@runtime_checkable
class Home(Protocol):
    """Where the blocks' weights are while they are not used."""

    def resident(self, name: str, *, dense: bool) -> AbstractContextManager[Any]:
        """A context in which a block's weights can be used: those it had at first if `dense`, else what they have become."""


class InMemory:
    """The blocks are in memory, all the time."""

    def resident(self, name: str, *, dense: bool) -> AbstractContextManager[Any]:
        """Nothing to do: they are as they are."""
        return nullcontext()


class OnDevice:
    """The blocks lie in host memory, and one at a time on an accelerator."""

    def __init__(self, blocks: Blocks, device: torch.device) -> None:
        self._blocks, self._device = blocks, device

    @contextmanager
    def resident(self, name: str, *, dense: bool) -> Iterator[None]:
        """The block is on the device, and afterwards where it was."""
        block = self._blocks[name]
        home = next(block.parameters()).device
        block.to(self._device)
        try:
            yield
        finally:
            block.to(home)


def find_stacks(model: nn.Module) -> list[Blocks]:
    """The chains of repeated blocks, by name, first to last: one for a decoder, two for an encoder with a decoder.

    Lists of modules that transformers itself calls unsplittable or that checkpoint as one layer, and do not lie inside
    another; failing that, the longest list of modules.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    # transformers 5 gives a set on some models, a list on others, and None where nothing is declared.
    unsplittable = set(getattr(model, "_no_split_modules", None) or ())
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }

    def is_block(module: nn.Module) -> bool:
        return type(module).__name__ in unsplittable or isinstance(module, GradientCheckpointingLayer)

    found = {name: module for name, module in lists.items() if all(is_block(child) for child in module)}
    if not found and lists:
        longest = max(lists, key=lambda name: len(lists[name]))
        found = {longest: lists[longest]}
    if not found:
        raise InvalidInput(
            f"{type(model).__name__} has no list of blocks; prune its layers one by one with prune_layer."
        )
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    return [{f"{name}.{index}": block for index, block in enumerate(found[name])} for name in outer]


def find_blocks(model: nn.Module) -> Blocks:
    """The blocks of all stacks, by name, first to last."""
    return {name: block for stack in find_stacks(model) for name, block in stack.items()}


def block_skips(model: nn.Module, num_blocks: int | None) -> list[str]:
    """Patterns for `skip` that leave all but the first blocks dense."""
    names = list(find_blocks(model))
    return [] if num_blocks is None else [f"{name}.*" for name in names[num_blocks:]]


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it on `device`."""
    from accelerate.utils import send_to_device

    return send_to_device(value, device)


@dataclass
class Call:
    """What a block was called with; the hidden state is `hidden_states` or the first argument."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """What the block makes of `hidden`, back on its device."""
        device = next((parameter.device for parameter in block.parameters()), hidden.device)
        args, kwargs = (
            to_device((self.args, self.kwargs), device) if device != hidden.device else (self.args, self.kwargs)
        )
        moved = hidden.to(device)
        if "hidden_states" in kwargs:
            output = block(*args, **{**kwargs, "hidden_states": moved})
        else:
            output = block(moved, *args[1:], **kwargs)
        return _first(output).to(hidden.device)

    @property
    def hidden(self) -> Tensor:
        """The hidden state that entered."""
        return self.kwargs["hidden_states"] if "hidden_states" in self.kwargs else self.args[0]

    def without_hidden(self) -> Call:
        """The call without its hidden state, which may be most of what it holds; `run` brings another."""
        if "hidden_states" in self.kwargs:
            return Call(self.args, {**self.kwargs, "hidden_states": None})
        return Call((None, *self.args[1:]), self.kwargs)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@dataclass
class Stack:
    """A stack's blocks, what each is called with, and the hidden states that enter the next one, a batch each."""

    blocks: Blocks
    calls: list[list[Call]]
    hidden: list[Tensor]

    @property
    def num_tokens(self) -> int:
        """Tokens (or patches) of calibration."""
        return sum(hidden[..., 0].numel() for hidden in self.hidden)

    def advance(self, index: int) -> None:
        """Replace the hidden states by what block `index`, which must be resident, makes of them."""
        block = list(self.blocks.values())[index]
        for number, call in enumerate(self.calls):
            self.hidden[number] = call[index].run(block, self.hidden[number])


@dataclass(frozen=True)
class Survey:
    """What one sequence through the dense model shows: per stack that ran, how its blocks hand on their state.

    `groups` holds by block the weights that took part in a product, those that had the very same input together.
    `passes_only_hidden` says which stacks hand on nothing but the hidden state, so that a pass may leave them out.
    """

    stacks: tuple[Blocks, ...]
    groups: dict[str, list[tuple[WeightRef, ...]]]
    passes_only_hidden: tuple[bool, ...]
    in_tuple: tuple[bool, ...]

    @property
    def blocks(self) -> Blocks:
        """The blocks of all stacks that ran."""
        return {name: block for stack in self.stacks for name, block in stack.items()}


def survey(model: nn.Module, home: Home, inputs: Mapping[str, Tensor]) -> Survey:
    """Run `inputs` through the dense model, check that replay reproduces it, and note which weights meet which inputs.

    Raises `InvalidInput` when the model's activations are not finite, when it calls its blocks more than once, or when
    running the blocks one by one gives something else than the model.
    """
    stacks = find_stacks(model)
    everything = {name: block for stack in stacks for name, block in stack.items()}
    recorder = _Recorder(everything, outputs=True)
    with recorder, _resident_when_called(home, everything, dense=True):
        _run(model, inputs)
    ran = tuple(stack for stack in stacks if any(recorder.calls[name] for name in stack))
    groups: dict[str, list[tuple[WeightRef, ...]]] = {}
    only_hidden, in_tuple = [], []
    for stack in ran:
        calls = recorder.once(stack)
        outputs = [recorder.outputs[name][0] for name in stack]
        hidden = calls[0].hidden
        for call, (name, block) in zip(calls, track(list(stack.items()), "Looking at the blocks"), strict=True):
            with home.resident(name, dense=True):
                # Looked up here, since a weight that comes and goes is another object each time.
                parameters = matrices(model, {name: block})[name]
                check_finite(parameters)
                groups[name], hidden = _watched(parameters, block, call, hidden)
        if not all_finite(hidden):
            raise InvalidInput("The dense model gives NaN or infinite activations on the first calibration sequence.")
        expected = _first(outputs[-1])
        if float((hidden - expected).abs().max() / expected.abs().max().clamp_min(1e-30)) > 1e-3:
            raise InvalidInput(
                f"Running the blocks of {next(iter(stack)).rsplit('.', 1)[0]} one by one does not reproduce the model: it "
                "does something between blocks that replay cannot see."
            )
        in_tuple.append(isinstance(outputs[0], tuple))
        only_hidden.append(all(not isinstance(o, tuple) or all(part is None for part in o[1:]) for o in outputs))
    return Survey(ran, groups, tuple(only_hidden), tuple(in_tuple))


def _watched(
    parameters: Mapping[str, nn.Parameter], block: nn.Module, call: Call, hidden: Tensor
) -> tuple[list[tuple[WeightRef, ...]], Tensor]:
    """The weights of a block in groups that share an input, in the order of use, and what the block returns."""
    uses: list[Use] = []
    with WeightWatch(parameters, uses.append):
        output = call.run(block, hidden)
    inputs: list[Tensor] = []
    members: list[list[WeightRef]] = []
    seen: set[str] = set()
    for use in uses:
        if use.parameter in seen:
            continue
        seen.add(use.parameter)
        refs = list(expanded(use.parameter, parameters[use.parameter], use.transposed))
        if use.expert is not None:
            # Experts see other tokens than their neighbours: each is on its own.
            inputs += [use.x] * len(refs)
            members += [[ref] for ref in refs]
            continue
        at = next((i for i, x in enumerate(inputs) if x is use.x or _same(x, use.x)), None)
        if at is None:
            inputs.append(use.x)
            members.append(refs)
        else:
            members[at] += refs
    # A layer of its own that this sequence did not reach, such as an unfused expert: others may.
    linear = {id(module.weight) for module in block.modules() if isinstance(module, nn.Linear)}
    for key, parameter in parameters.items():
        if key not in seen and id(parameter) in linear:
            members.append(list(expanded(key, parameter, False)))
    return [tuple(group) for group in members], output


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def record(model: nn.Module, home: Home, seen: Survey, number: int, batches: Sequence[Mapping[str, Tensor]]) -> Stack:
    """The calls of stack `number` and the hidden states that enter it, from a pass of the model as it is now.

    Its blocks return what they get, since masks, rotary embeddings and position biases do not depend on it; where they
    hand on more than a hidden state, they run.
    """
    stack = Stack(seen.stacks[number], [], [])
    stand_in = None
    if seen.passes_only_hidden[number]:
        stand_in = _return_hidden_in_tuple if seen.in_tuple[number] else _return_hidden
    running = {name: block for name, block in seen.blocks.items() if stand_in is None or name not in stack.blocks}
    for batch in track(batches, "Recording calls") if len(batches) > 8 else batches:
        recorder = _Recorder(stack.blocks, stop=True)
        with recorder, _replaced(stack.blocks, stand_in), _resident_when_called(home, running, dense=False):
            _run(model, batch)
        calls = recorder.once(stack.blocks)
        stack.calls.append([call.without_hidden() for call in calls])
        stack.hidden.append(calls[0].hidden)
    return stack


class _Finished(Exception):
    """Ends a pass of which the rest is not needed."""


class _Recorder:
    """While entered, notes the calls of blocks, and with `outputs` what they return; `stop` ends the pass after the last."""

    def __init__(self, blocks: Blocks, *, outputs: bool = False, stop: bool = False) -> None:
        self.calls: dict[str, list[Call]] = {name: [] for name in blocks}
        self.outputs: dict[str, list[Any]] = {name: [] for name in blocks}
        self._blocks, self._keep_outputs, self._stop = blocks, outputs, stop
        self._handles = ExitStack()

    def __enter__(self) -> _Recorder:
        last = next(reversed(self._blocks))
        for name, block in self._blocks.items():

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                self.calls[name].append(Call(args, dict(kwargs)))

            def after(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                if self._keep_outputs:
                    self.outputs[name].append(output)
                if self._stop and name == last:
                    raise _Finished

            # First of all hooks, so that the arguments are noted where the model made them.
            self._handles.callback(block.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
            self._handles.callback(block.register_forward_hook(after).remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._handles.close()
        return kind is _Finished

    def once(self, blocks: Blocks) -> list[Call]:
        """The call of each block, in their order. Raises `InvalidInput` unless each was called once."""
        counts = [len(self.calls[name]) for name in blocks]
        if counts != [1] * len(blocks):
            raise InvalidInput(
                f"The model called its {len(blocks)} blocks {sum(counts)} times in one pass; replay needs once each."
            )
        return [self.calls[name][0] for name in blocks]


@contextmanager
def _resident_when_called(home: Home, blocks: Blocks, *, dense: bool) -> Iterator[None]:
    """Blocks that are called by the model itself get their weights, and their inputs beside them, for the call."""
    if isinstance(home, InMemory):
        yield
        return
    inside: dict[str, tuple[ExitStack, torch.device]] = {}
    with ExitStack() as handles:
        for name, block in blocks.items():

            def before(
                block: nn.Module, args: Any, kwargs: Any, name: str = name
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                opened = handles.enter_context(ExitStack())
                opened.enter_context(home.resident(name, dense=dense))
                inside[name] = opened, Call(args, kwargs).hidden.device
                moved: tuple[tuple[Any, ...], dict[str, Any]] = to_device(
                    (args, kwargs), next(block.parameters()).device
                )
                return moved

            def after(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> Any:
                opened, device = inside.pop(name)
                output = to_device(output, device)
                opened.close()
                return output

            handles.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            handles.callback(block.register_forward_hook(after, with_kwargs=True, prepend=True).remove)
        yield


@contextmanager
def _replaced(blocks: Blocks, stand_in: Callable[..., Any] | None) -> Iterator[None]:
    """The forward of every block is `stand_in`, where there is one."""
    if stand_in is None:
        yield
        return
    # An instance may carry a forward of its own (accelerate's hooks put one there); most do not.
    own = {name: vars(block).get("forward") for name, block in blocks.items()}
    try:
        for block in blocks.values():
            vars(block)["forward"] = stand_in
        yield
    finally:
        for name, block in blocks.items():
            if own[name] is not None:
                vars(block)["forward"] = own[name]
            else:
                del vars(block)["forward"]


def _return_hidden(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _return_hidden_in_tuple(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
    return (hidden_states,)


def _run(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    # The head is not needed, and at a large vocabulary it is the dearest layer.
    body = getattr(model, "base_model", model)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    body(**to_device(dict(inputs), device))


@contextmanager
def calm(model: Any) -> Iterator[None]:
    """Evaluation mode, no key-value cache, and experts one by one; afterwards everything as it was."""
    modes = {module: module.training for module in model.modules()}
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    cached = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    experts = model.get_experts_implementation() if hasattr(model, "get_experts_implementation") else None
    try:
        model.eval()
        for config, _ in cached:
            config.use_cache = False
        if experts is not None:
            # Grouped kernels hide which expert sees which token.
            model.set_experts_implementation("eager")
        yield
    finally:
        if experts is not None:
            model.set_experts_implementation(experts)
        for config, value in cached:
            config.use_cache = value
        for module, mode in modes.items():
            module.training = mode
