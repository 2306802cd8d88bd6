"""Processes that work together: each ends with the same result, and what stops one stops all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tdkit.errors import TdkitError
from tdkit.support.processes import failing_together, is_main_process, on_main_process, processes, shared
from tests.together import run_together

linux = pytest.mark.skipif(sys.platform != "linux", reason="gloo over a file")


def test_alone_everything_is_done_here_in_order() -> None:
    assert processes() == (0, 1)
    assert is_main_process()
    assert list(shared([3, 1, 2], lambda n: n * n)) == [9, 1, 4]
    assert on_main_process(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError), failing_together():
        on_main_process(lambda: 1 // 0)


@linux
def test_two_processes_fit_a_layer_each_and_end_with_the_same_model(tmp_path: Path) -> None:
    import torch

    import tdkit
    from tdkit import Auto, LowRank, Policy, Rule
    from tests.conftest import make_gpt2

    run_together(
        tmp_path,
        """
        import tdkit
        from tdkit import Auto, LowRank, Policy, Rule
        from tests.conftest import make_gpt2

        torch.manual_seed(5)
        model = make_gpt2()
        batches = [torch.arange(24).reshape(2, 12) + step for step in range(3)]
        rules = [Rule("transformer.h.*.attn.*", Auto(), budget=0.6), Rule("transformer.h.*", LowRank(), budget=0.5)]
        tdkit.compress(model, Policy(rules), calibration=batches, progress=False)
        torch.save({k: v.detach().contiguous() for k, v in model.named_parameters()}, folder / f"model-{rank}.pt")
        """,
    )
    torch.manual_seed(5)
    model = make_gpt2()
    batches = [torch.arange(24).reshape(2, 12) + step for step in range(3)]
    rules = [Rule("transformer.h.*.attn.*", Auto(), budget=0.6), Rule("transformer.h.*", LowRank(), budget=0.5)]
    tdkit.compress(model, Policy(rules), calibration=batches, progress=False)
    for rank in range(2):
        found = torch.load(tmp_path / f"model-{rank}.pt", weights_only=True)
        assert list(found) == [name for name, _ in model.named_parameters()]
        for name, tensor in model.named_parameters():
            torch.testing.assert_close(found[name], tensor.detach(), rtol=1e-4, atol=1e-6, msg=name)


@linux
def test_work_is_divided_and_given_to_all(tmp_path: Path) -> None:
    lines = run_together(
        tmp_path,
        """
        seen = []
        say(list(shared(range(7), lambda n: seen.append(n) or n * n)), seen)
        say(list(shared(range(2), lambda n: n)), list(shared([], lambda n: n)))
        """,
        count=3,
    )
    assert [line[0] for line in lines] == [f"[0, 1, 4, 9, 16, 25, 36] {list(range(7))[rank::3]}" for rank in range(3)]
    assert {line[1] for line in lines} == {"[0, 1] []"}


@linux
def test_an_exception_in_one_is_raised_in_all_whatever_the_others_do(tmp_path: Path) -> None:
    """After each the processes go on together: nobody is one exchange behind the others."""
    lines = run_together(
        tmp_path,
        """
        class Unpicklable(SourceError):
            def __init__(self, place, lock):
                super().__init__(f"{place} is damaged")
                self.lock = lock

        def work(error):
            def do(n):
                if n == 3:
                    raise error
                return n
            return lambda: list(shared(range(6), do))

        def loop(error):
            with failing_together():
                for n in shared(range(6), lambda n: n):
                    if rank == 1 and n == 3:
                        raise error

        def last(error):
            with failing_together():
                for n in shared(range(6), lambda n: n):
                    if rank == 1 and n == 5:
                        raise error

        def nested(error):
            with failing_together():
                if rank == 1:
                    with failing_together():
                        raise error
                on_main_process(lambda: 1)

        say(raised(work(ValueError("bad"))))
        say(raised(work(SourceError("no text"))))
        say(raised(work(Unpicklable("that", threading.Lock()))))
        say(raised(lambda: list(shared(range(2), lambda n: threading.Lock() if n else n))))
        for attempt in (loop, last, nested):
            say(raised(lambda: attempt(ValueError("bad"))))
        say(raised(lambda: on_main_process(lambda: 1 // 0)))
        say(list(shared(range(4), lambda n: n)))
        """,
    )
    assert lines[0][:2] == ["TdkitError: process 1 failed: ValueError('bad')", "SourceError: no text"]
    assert lines[1][:2] == lines[0][:2]
    assert lines[0][2] == "TdkitError: process 1 failed: Unpicklable('that is damaged')"
    assert lines[1][2] == "Unpicklable: that is damaged"
    for line in lines:
        assert "process 1 failed" in line[3]
        assert "lock" in line[3]
    assert lines[0][4:7] == ["TdkitError: process 1 failed: ValueError('bad')"] * 3
    assert lines[1][4:7] == ["ValueError: bad"] * 3
    for line in lines:
        assert "process 0 failed: ZeroDivisionError" in line[7]
        assert line[8] == "[0, 1, 2, 3]"


@linux
def test_an_interrupt_of_one_stops_all(tmp_path: Path) -> None:
    """In its own work, while it waits for another, and in the loop; after each the processes go on together."""
    lines = run_together(
        tmp_path,
        """
        def interrupt():
            os.kill(os.getpid(), signal.SIGINT)

        def at_work(n):
            if n == 1:
                interrupt()
                time.sleep(60)

        def while_waiting(n):
            if n == 0:  # the other has nothing to do and waits: the signal comes while it does
                (folder / "waits").touch()
                while not (folder / "interrupted").exists():
                    time.sleep(0.01)
            return n

        def later(main):
            while not (folder / "waits").exists():
                time.sleep(0.01)
            signal.pthread_kill(main, signal.SIGINT)
            (folder / "interrupted").touch()

        def waiting():
            with failing_together():
                if rank == 1:
                    threading.Thread(target=later, args=[threading.main_thread().ident]).start()
                list(shared([0], while_waiting))

        def loop():
            with failing_together():
                for n in shared(range(4), lambda n: n):
                    if rank == 1 and n == 3:
                        interrupt()
                        time.sleep(60)

        say(raised(lambda: list(shared(range(2), at_work))))
        say(raised(waiting))
        say(raised(loop))
        say(signal.getsignal(signal.SIGINT) is signal.default_int_handler, list(shared(range(4), lambda n: n)))
        """,
    )
    for line in lines:
        assert line == [*["KeyboardInterrupt: "] * 3, "True [0, 1, 2, 3]"]


@linux
def test_an_interrupt_of_all_at_once_strands_none(tmp_path: Path) -> None:
    """As Ctrl-C in a terminal, which every process gets: some at work, the others waiting for them."""
    lines = run_together(
        tmp_path,
        """
        def attempt():
            with failing_together():
                for _ in shared(range(3), lambda n: (folder / f"at-{n}").touch() or time.sleep(0.01 if n else 60)):
                    pass

        def later():
            while len(list(folder.glob("at-*"))) < count:
                time.sleep(0.01)
            time.sleep(0.3)  # by now the others most likely wait for the first; right whether they do or not
            for place in folder.glob("pid-*"):
                os.kill(int(place.name[4:]), signal.SIGINT)

        (folder / f"pid-{os.getpid()}").touch()
        if rank == 0:
            threading.Thread(target=later).start()
        say(raised(attempt))
        say(list(shared(range(4), lambda n: n)))
        """,
        count=3,
    )
    for line in lines:
        assert line == ["KeyboardInterrupt: ", "[0, 1, 2, 3]"]


@linux
def test_the_main_process_works_by_itself(tmp_path: Path) -> None:
    lines = run_together(
        tmp_path,
        """
        def work():
            with failing_together():
                inner = on_main_process(lambda: sum(shared(range(5), lambda n: n)))
            with (folder / "written").open("a") as file:
                file.write(f"by {rank}, ")
            return processes(), inner

        say(is_main_process(), on_main_process(work), processes())
        """,
    )
    assert (tmp_path / "written").read_text() == "by 0, "
    assert lines == [["True ((0, 1), 10) (0, 2)"], ["False ((0, 1), 10) (1, 2)"]]


def test_a_lost_process_is_an_error_of_the_others(tmp_path: Path) -> None:
    lines = run_together(
        tmp_path,
        """
        list(shared(range(4), lambda n: n))  # by now they are connected

        def attempt():
            with failing_together():
                if rank == 1:
                    os._exit(0)
                list(shared(range(4), lambda n: n))

        say(raised(attempt).partition(":")[0] != "nothing")
        os._exit(0)
        """,
    )
    assert lines == [["True"], []]


def test_an_error_of_ours_stays_one() -> None:
    with pytest.raises(TdkitError, match="no more"), failing_together():
        raise TdkitError("no more")


@linux
def test_a_failure_while_layers_are_replaced_stops_every_process_and_leaves_their_models(tmp_path: Path) -> None:
    lines = run_together(
        tmp_path,
        """
        import tdkit
        from tdkit import LowRank, Policy, Rule
        from tdkit.models.swap import Swap
        from tests.conftest import make_gpt2

        model = make_gpt2()
        before = dict(model.named_modules())
        put = Swap.put

        def failing(self, fitted):
            if rank == 1 and "h.2" in fitted[0][0].name:
                raise KeyboardInterrupt if kind == "interrupt" else ValueError("no room")
            put(self, fitted)

        Swap.put = failing
        for kind in ("error", "interrupt"):
            try:
                tdkit.compress(model, Policy([Rule("*", LowRank(rank=2))]), progress=False)
            except (Exception, KeyboardInterrupt) as error:
                say(type(error).__name__, dict(model.named_modules()) == before)
        """,
    )
    assert lines[0] == ["TdkitError True", "KeyboardInterrupt True"]
    assert lines[1] == ["ValueError True", "KeyboardInterrupt True"]


@linux
def test_one_process_saves_alone_or_with_the_others(tmp_path: Path) -> None:
    lines = run_together(
        tmp_path,
        """
        import tdkit
        from tdkit import LowRank, Policy, Rule
        from tests.conftest import make_gpt2

        torch.manual_seed(0)
        model = tdkit.compress(make_gpt2(), Policy([Rule("*", LowRank(rank=2))]), progress=False)
        say(tdkit.save(model, folder / "together").name)
        if rank == 0:
            tdkit.save(model, folder / "alone")
        torch.distributed.barrier()
        loaded = tdkit.load(folder / "together")
        say(all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters())))
        """,
    )
    assert lines == [["together", "True"]] * 2
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} >= {"together", "alone"}
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".together")]
