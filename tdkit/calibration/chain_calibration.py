"""Calibrate a chain of blocks with one of them in memory at a time: forward through all, then backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.calibration.batches import Batch, unweighted
from tdkit.calibration.calibration import Calibration
from tdkit.calibration.chains import Call, hidden_states, within
from tdkit.calibration.measure import recorders_within
from tdkit.calibration.moments import Reach, Recorder, SharingBrokeError, reaching
from tdkit.calibration.passing import Form, StopRun, in_place_of_blocks, watched
from tdkit.calibration.runner import Runner
from tdkit.calibration.states import States
from tdkit.errors import CalibrationError
from tdkit.models.sites import Site
from tdkit.sources.on_disk import OpenedModel
from tdkit.support.compatibility import tree_leaves
from tdkit.support.progress import Bar

IN_MEMORY = "load the model and calibrate it in memory"


class ChainCalibration:
    """One calibration of a model in files, whose blocks form one chain.

    Args:
        opened: the model.
        runner: of the model.
        sites: the weights to measure.
        names: of the blocks, in their order.
        batches: the calibration batches.
        states: takes hidden states, gradients and arguments of blocks.
        limit_bytes: the maximum size in bytes of the moments in memory at once.
        bar: advances with each block and batch.
    """

    def __init__(
        self,
        opened: OpenedModel,
        runner: Runner,
        sites: Sequence[Site],
        names: tuple[str, ...],
        batches: list[Batch],
        states: States,
        limit_bytes: int,
        bar: Bar,
    ) -> None:
        self.model, self.weights, self.runner = opened.model, opened.weights, runner
        self.names, self.batches, self.states, self.limit_bytes, self.bar = names, batches, states, limit_bytes, bar
        self.blocks = [self.model.get_submodule(name) for name in names]
        inside = {id(module) for block in self.blocks for module in block.modules()}
        self.outside = [module for module in self.model.modules() if id(module) not in inside]
        self.sites = [[site for site in sites if within(site, [name])] for name in names]
        self.outer_sites = [site for site in sites if not within(site, names)]
        self._check_ties([*self.outer_sites, *(site for inner in self.sites for site in inner)])
        self.units = [runner.call(batch).units for batch in batches]
        self.forms: list[Form] = []
        self.calls: list[list[Any]] = []  # for each batch and block, its other arguments, on disk
        self.reach = Reach()
        self.result = runner.calibration(batches)

    def run(self) -> Calibration:
        """Returns the moments.

        Raises:
            CalibrationError: when the blocks do not form one chain.
        """
        self._look()
        self._enter()
        for number in range(len(self.blocks)):
            self._forward(number)
        outer = Recorder(self.outer_sites, gradients=self.runner.gradients, unseen=self._unseen())
        self._leave(outer)
        if self.runner.gradients:
            for number in reversed(range(len(self.blocks))):
                self._backward(number)
            self._enter_backward(outer)
        self.result.add(outer.metrics(), spill=True)
        self.result.rows |= outer.rows()
        self.result.units = round(outer.units)
        if not self.result.names:
            raise CalibrationError("the calibration batches reach no layer that can be rewritten")
        return self.result

    def _look(self) -> None:
        """Run the first batch through the whole model to see that the blocks are a chain, and how they are called.

        It runs again with the blocks left out, which must make no difference to their arguments and to the output.
        """
        batch, gradients = self.batches[0], self.runner.gradients
        with self.weights.brought(self.outside), torch.no_grad():
            with self._arriving():
                self.runner.find_causality(self.batches)
                with watched(self.model, self.names) as seen, reaching(self.outer_sites) as self.reach:
                    output = self.runner.forward(batch)
            self.forms = seen.forms
            calls: list[Call] = []
            attached = ExitStack()

            def at(number: int, hidden: Tensor, call: Call) -> Tensor:
                attached.close()
                calls.append(call)
                return seen.last[0] if number == len(self.blocks) - 1 else hidden.detach()

            with in_place_of_blocks(self.model, self.names, self.forms, at), attached:
                if gradients:
                    attached.enter_context(Recorder(self.outer_sites, gradients=True).attached())
                with torch.set_grad_enabled(gradients):
                    again = self.runner.forward(batch)
        for name, call, before in zip(self.names, calls, seen.calls, strict=True):
            if not _alike(call, before):
                raise CalibrationError(f"{name} takes an argument that the blocks before it computed: {IN_MEMORY}")
            if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(call)):
                raise CalibrationError(
                    f"{name} takes an argument that layers outside of the blocks computed, through which gradients "
                    f"would flow: {IN_MEMORY}"
                )
        leaves = [leaf for leaf in tree_leaves(_parts(again)) if isinstance(leaf, Tensor)]
        if not _alike(_parts(again), _parts(output)) or any(leaf.requires_grad for leaf in leaves):
            raise CalibrationError(
                f"the output of the model depends on more than what {self.names[-1]} returns: {IN_MEMORY}"
            )

    def _enter(self) -> None:
        """Run what comes before the blocks on all batches, and keep the arguments of the blocks."""
        for batch, given in enumerate(self.batches):
            calls: list[Call] = []

            def at(number: int, hidden: Tensor, call: Call) -> Tensor:
                if not number:
                    self.states.write("hidden", 0, batch, hidden)  # noqa: B023, called at once
                calls.append(call)  # noqa: B023
                if number == len(self.blocks) - 1:
                    raise StopRun
                return hidden

            with torch.no_grad():
                self._run_outside(given, at)
            self.calls.append(self.states.keep(calls, batch))

    def _forward(self, number: int) -> None:
        """Run a block on all batches; without gradients, record its inputs."""

        def run(recorder: Recorder | None) -> None:
            for batch in range(len(self.batches)):
                if recorder is not None:
                    self._begin(recorder, batch)
                hidden = self._block(number, batch, self.states.read("hidden", number, batch))
                self.states.write("hidden", number + 1, batch, hidden)
                if recorder is not None:
                    recorder.end_batch(self.units[batch])
                self.bar.advance()

        with self.weights.brought(self.blocks[number].modules()), torch.no_grad():
            if self.runner.gradients or not self.sites[number]:
                run(None)
            else:
                self._record(number, run)
        if not self.runner.gradients:
            self.states.drop("hidden", number, len(self.batches))

    def _leave(self, outer: Recorder) -> None:
        """Run what comes after the blocks on all batches: to the loss and back, if there are gradients.

        Without gradients what comes before the blocks is recorded too.
        """
        last = len(self.blocks) - 1
        for batch, given in enumerate(self.batches):
            self._begin(outer, batch)
            final = self.states.read("hidden", last + 1, batch).requires_grad_(self.runner.gradients)
            with (
                self.weights.brought(self.outside),
                ExitStack() as attached,
                torch.set_grad_enabled(self.runner.gradients),
            ):
                if not self.runner.gradients:
                    attached.enter_context(outer.attached())

                def at(number: int, hidden: Tensor, _: Call) -> Tensor:
                    if number < last:
                        return hidden
                    if self.runner.gradients:
                        attached.enter_context(outer.attached())
                    return final.clone()  # noqa: B023, what follows may change it in place

                output = self._run_outside(given, at)
                if self.runner.gradients:
                    self.runner.backward(output, given, batch)
            if self.runner.gradients:
                gradient = torch.zeros_like(final) if final.grad is None else final.grad
                self.states.write("gradient", last + 1, batch, gradient)
            outer.end_batch(0 if self.runner.gradients else self.units[batch])

    def _backward(self, number: int) -> None:
        """Run a block forward and backward on all batches and record both."""

        def run(recorder: Recorder | None) -> None:
            for batch in range(len(self.batches)):
                if recorder is not None:
                    self._begin(recorder, batch)
                hidden = self.states.read("hidden", number, batch).requires_grad_()
                output = self._block(number, batch, hidden.clone())  # a block may change its input in place
                output.backward(self.states.read("gradient", number + 1, batch))  # type: ignore[no-untyped-call]
                assert hidden.grad is not None
                self.states.write("gradient", number, batch, hidden.grad)
                if recorder is not None:
                    recorder.end_batch(self.units[batch])
                self.bar.advance()

        with self.weights.brought(self.blocks[number].modules()), torch.enable_grad():
            if self.sites[number]:
                self._record(number, run)
            else:
                run(None)
        self.states.drop("hidden", number + 1, len(self.batches))
        self.states.drop("gradient", number + 1, len(self.batches))

    def _enter_backward(self, outer: Recorder) -> None:
        """Run what comes before the blocks on all batches, backward from the gradient at the first block."""
        late = {name: outer.gradients_of(name) for name in self._unseen()}
        for batch, given in enumerate(self.batches):
            self._begin(outer, batch)
            entered: list[Tensor] = []

            def at(_: int, hidden: Tensor, __: Call) -> Tensor:
                entered.append(hidden)  # noqa: B023, called at once
                raise StopRun

            with self.weights.brought(self.outside), outer.attached(), torch.enable_grad():
                self._run_outside(given, at)
                if entered[0].requires_grad:
                    entered[0].backward(self.states.read("gradient", 0, batch))  # type: ignore[no-untyped-call]
            outer.end_batch(self.units[batch])
        twice = [name for name, count in late.items() if count and outer.gradients_of(name) > count]
        if twice:
            raise CalibrationError(f"{', '.join(twice[:3])}: used before and after the blocks: {IN_MEMORY}")

    def _record(self, number: int, run: Callable[[Recorder], None]) -> None:
        """Record the sites of a block while it runs, in as many runs as their moments need."""
        with reaching(self.sites[number]) as reach, torch.no_grad():
            self._block(number, 0, self.states.read("hidden", number, 0))
        try:
            recorded = list(self._recorded(reach, run))
        except SharingBrokeError:
            recorded = list(self._recorded(Reach(reach.sites, reach.others), run))
        for metrics, rows in recorded:
            self.result.add(metrics, spill=True)
            self.result.rows |= rows

    def _begin(self, recorder: Recorder, batch: int) -> None:
        given = self.batches[batch]
        recorder.begin_batch(self.runner.mask(given), unweighted(given)[1])

    def _recorded(
        self, reach: Reach, run: Callable[[Recorder], None]
    ) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
        for make in recorders_within(reach, self.runner.gradients, self.limit_bytes):
            recorder = make()
            with recorder.attached():
                run(recorder)
            yield recorder.metrics(), recorder.rows()

    def _block(self, number: int, batch: int, hidden: Tensor) -> Tensor:
        args, kwargs = self.states.restore(self.calls[batch][number])
        return hidden_states(self.blocks[number](hidden, *args, **kwargs))

    def _run_outside(self, batch: Batch, at: Callable[[int, Tensor, Call], Tensor]) -> Any:
        """Run the model with its blocks left out; returns its output, or None if the run is stopped."""
        with self.weights.brought(self.outside), in_place_of_blocks(self.model, self.names, self.forms, at):
            try:
                return self.runner.forward(batch)
            except StopRun:
                return None

    @contextmanager
    def _arriving(self) -> Iterator[None]:
        """A context manager inside which each block is in memory while it runs, so that the whole model can run."""
        held: list[ExitStack] = []

        def enter(block: nn.Module, _: object) -> None:
            held.append(ExitStack())
            held[-1].enter_context(self.weights.brought(block.modules()))

        def leave(*_: object) -> None:
            held.pop().close()

        handles = [block.register_forward_pre_hook(enter) for block in self.blocks]
        handles += [block.register_forward_hook(leave) for block in self.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            while held:
                held.pop().close()

    def _unseen(self) -> set[str]:
        return {site.name for site in self.reach.others}

    def _check_ties(self, sites: Sequence[Site]) -> None:
        for site in sites:
            parts = {
                next((name for name in self.names if f"{user.layer}.".startswith(f"{name}.")), None)
                for user in site.users
            }
            if len(parts) > 1:
                raise CalibrationError(f"{' and '.join(site.names)} are tied across blocks: {IN_MEMORY}")


def _parts(output: Any) -> Any:
    """Returns the output of a model as nested containers that are looked into."""
    return dict(output) if isinstance(output, dict) else output


def _alike(first: Any, second: Any) -> bool:
    """Returns whether nested arguments or outputs are equal, tensors up to rounding."""
    ours, theirs = tree_leaves(first), tree_leaves(second)
    return len(ours) == len(theirs) and all(_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return (
            torch.equal(a, b) if not a.is_floating_point() else bool(torch.allclose(a, b, 1e-3, 1e-5, equal_nan=True))
        )
    return type(a) is type(b) and (isinstance(a, nn.Module) or bool(a is b or a == b or not _is_plain(a)))


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
