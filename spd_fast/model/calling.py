"""How a target is called on a batch, and which tensor of what it returns is its output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from spd_fast.errors import UserError
from spd_fast.model.factored import dense

__all__ = ["Caller", "OutputSelector", "select_output"]

OutputSelector = str | int | Callable[[Any], Tensor]
Adapter = Callable[[nn.Module, Any], Any]

# What a target raises where it cannot take a batch.
_REFUSALS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)
# Modules that have a fused forward for inference, which does not call the modules inside them.
_WITH_FAST_PATH = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
_STOCHASTIC = (
    nn.modules.dropout._DropoutNd,
    nn.modules.batchnorm._BatchNorm,
)


def _fields(output: Any) -> list[str]:
    """What can be selected from ``output``."""
    if isinstance(output, Mapping):
        return [str(key) for key in output]
    if isinstance(output, (tuple, list)):
        return [str(i) for i in range(len(output))]
    return []


def _having(output: Any) -> str:
    fields = _fields(output)
    return f"; it has {', '.join(map(repr, fields))}" if fields else ""


def _step(output: Any, key: str | int) -> Any:
    """One field, key or index of ``output``; LookupError where there is none."""
    if isinstance(key, str) and isinstance(output, Mapping):
        return output[key]
    if isinstance(key, str) and not key.lstrip("-").isdigit():
        try:
            return getattr(output, key)
        except AttributeError:
            raise KeyError(key) from None
    try:
        return output[int(key)]
    except TypeError:
        raise KeyError(key) from None


def select_output(output: Any, selector: OutputSelector | None) -> Tensor:
    """The tensor of a target's ``output`` that ``selector`` names.

    Args:
        selector: None where the target returns a tensor; a field name or key (``"logits"``), an
            index, a dotted path of both (``"hidden_states.3"``), or a function of the output.

    Raises:
        UserError: no such field, or one that is no tensor; names the fields there are.
    """
    kind, found = type(output).__name__, output
    named = repr(selector)
    if callable(selector):
        named = f"function {getattr(selector, '__name__', type(selector).__name__)!r}"
        try:
            found = selector(output)
        except (AttributeError, LookupError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"output {named} fails on the target's {kind}: {reason}{_having(output)}"
            ) from error
    elif selector is not None:
        steps: list[str | int] = [*selector.split(".")] if isinstance(selector, str) else [selector]
        for key in steps:
            try:
                found = _step(found, key)
            except LookupError:
                raise UserError(
                    f"output {selector!r}: the target returns a {kind} without it{_having(output)}"
                ) from None
    found = dense(found)
    if isinstance(found, Tensor):
        return found
    if selector is None:
        raise UserError(
            f"the target returns a {kind}, need a tensor: choose one with `output`{_having(output)}"
        )
    raise UserError(
        f"output {named} of the target's {kind} is a {type(found).__name__}, need a tensor"
    )


def _described(batch: Any) -> str:
    """Types and shapes, for an error message."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}"
    if isinstance(batch, Mapping):
        return ", ".join(f"{key}: {_described(value)}" for key, value in batch.items())
    return f"a {type(batch).__name__}"


class Caller:
    """Calls a target on a batch and selects its output.

    A tensor is the target's first argument, a mapping its keyword arguments. Models that keep keys
    and values for generation are told not to. ``adapter(target, batch)`` replaces all of this.
    """

    def __init__(
        self,
        target: nn.Module,
        output: OutputSelector | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self.target, self.output, self.adapter = target, output, adapter
        modules = list(target.modules())
        self._compiled = any(
            type(m).__name__ == "OptimizedModule"
            or getattr(m, "_compiled_call_impl", None) is not None
            for m in modules
        )
        self._stochastic = [m for m in modules if isinstance(m, _STOCHASTIC)]
        self._fast_path = any(isinstance(m, _WITH_FAST_PATH) for m in modules)
        config = getattr(target, "config", None)
        parameters = inspect.signature(target.forward).parameters
        self._pretrained = config is not None and hasattr(target, "get_input_embeddings")
        self._keywords = {"use_cache": False} if "use_cache" in parameters else {}
        self._context = getattr(config, "max_position_embeddings", None)
        self._vocabulary: int | None = None
        if self._pretrained and getattr(target, "main_input_name", "") == "input_ids":
            embeddings: Any = target.get_input_embeddings()  # type: ignore[operator]
            self._vocabulary = getattr(embeddings, "num_embeddings", None)
        self._tokens_seen = False

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Where a module's forward can be taken over: neither under ``torch.compile`` nor on the
        fused path of torch's own transformers."""
        fast = self._fast_path and torch.backends.mha.get_fastpath_enabled()
        stance = torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()
        with stance:
            if fast:
                torch.backends.mha.set_fastpath_enabled(False)
            try:
                yield
            finally:
                if fast:
                    torch.backends.mha.set_fastpath_enabled(True)

    def __call__(self, batch: Any) -> Tensor:
        """The target's output tensor.

        Raises:
            UserError: a target in training mode whose forward is random or keeps statistics;
                tokens the model cannot take; an output that is no tensor.
        """
        self._check_mode()
        with self.eager():
            if self.adapter is not None:
                return select_output(self.adapter(self.target, batch), self.output)
            if isinstance(batch, Mapping):
                arguments = dict(batch)
                if "input_ids" in arguments:
                    arguments["input_ids"] = self._tokens(arguments["input_ids"])
                raw = self.target(**(self._keywords | arguments))
            else:
                raw = self.target(self._tokens(batch), **self._keywords)
        return select_output(raw, self.output)

    def clean(self, batch: Any) -> Tensor:
        """The same where the target's modules are its own: what it raises is about the batch.

        Raises:
            UserError: also for a batch that the target cannot take.
        """
        try:
            return self(batch)
        except UserError:
            raise
        except _REFUSALS as error:
            reason = " ".join(str(error).split())
            if "memory" in reason:  # torch has a class for it on a GPU only
                raise
            raise UserError(
                f"the target cannot take this batch ({_described(batch)}): {reason}"
            ) from error

    def _check_mode(self) -> None:
        if self._pretrained and self.target.training:
            raise UserError("the target is in training mode: call target.eval() first")
        for module in self._stochastic:
            if module.training and getattr(module, "p", 1.0) > 0:
                raise UserError(
                    f"the target holds a {type(module).__name__} in training mode, so its output "
                    "is not a function of its input: call target.eval() first"
                )

    def _tokens(self, tokens: Any) -> Any:
        """``tokens`` checked and as the embedding wants them."""
        if self._vocabulary is None or not isinstance(tokens, Tensor):
            return tokens
        if tokens.is_floating_point():
            raise UserError(f"the model takes token ids, got a tensor of {tokens.dtype}")
        if tokens.ndim != 2:
            raise UserError(f"the model takes tokens [batch, position], got {tuple(tokens.shape)}")
        if self._context is not None and tokens.shape[1] > self._context:
            raise UserError(
                f"sequences of {tokens.shape[1]} tokens are longer than the model's context of "
                f"{self._context}"
            )
        if tokens.dtype not in (torch.int64, torch.int32):
            tokens = tokens.long()
        # On a GPU the check waits for the device: once.
        if tokens.numel() and (tokens.device.type == "cpu" or not self._tokens_seen):
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self._vocabulary:
                raise UserError(
                    f"token {low if low < 0 else high} is out of range: the model's vocabulary has "
                    f"{self._vocabulary} tokens"
                )
            self._tokens_seen = True
        return tokens
