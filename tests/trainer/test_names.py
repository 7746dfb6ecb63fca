"""The public names of a Brain are one list in the docs, and no other name collides with it."""

from __future__ import annotations

import inspect
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.small import Players, Regressor, batches, everything, make, net, same
from trainer import Brain, Checkpointer
from trainer.brain import ATTRIBUTES, FIXED, METHODS, OWN
from trainer.speechbrain_names import OPTIONS, READ, SETTINGS

DOCS = Path(__file__).parents[2] / "docs" / "public-names.md"
# Names that users of Brain-style trainers set.
USERS = {
    "patience", "statistics", "average", "monitor", "journal", "profiler", "precision", "framework",
    "keeper", "forensics", "weight_average", "last_batch", "ema", "depth", "scaler", "loggers",
    "train_stats", "_fit_train", "_evaluate", "_added_steps", "_ready", *OPTIONS, *READ,
}  # fmt: skip


def words() -> set[str]:
    """The names in Brain's own file, without their leading underscores and with one."""
    found = set(re.findall(r"\w+", Path(inspect.getfile(Brain)).read_text(encoding="utf-8")))
    bare = {name.lstrip("_") for name in found if not name.startswith("_Brain__")}
    return {name for name in bare | {f"_{name}" for name in bare} if name.isidentifier()}


def public_names() -> set[str]:
    return {name for name in dir(Brain) if not name.startswith("_")} | ATTRIBUTES


def test_the_public_names_are_those_of_the_docs() -> None:
    text = DOCS.read_text(encoding="utf-8")
    table = text[text.index("## Brain") :]
    listed = set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE))
    assert listed == public_names()
    read = text[text.index("### Names of SpeechBrain's") :]
    assert set(re.findall(r"`(\w+)`", read)) == {*OPTIONS, *READ, "last_batch"}


@pytest.mark.parametrize("when", ["before", "in the constructor", "in a hook"])
@pytest.mark.parametrize("kind", [Regressor, Players])
def test_any_other_attribute_belongs_to_the_user(
    kind: type[Brain], when: str, tmp_path: Path
) -> None:
    names = (USERS | words()) - {name for name in dir(kind) if not name.startswith("_")}
    names -= ATTRIBUTES

    def spoil(brain: Any) -> None:
        for name in names:
            setattr(brain, name, {"of": name})

    class Mine(kind):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if when == "before":
                spoil(self)
            super().__init__(*args, **kwargs)
            if when == "in the constructor":
                spoil(self)

        def on_stage_start(self, *args: Any) -> None:
            if when == "in a hook":
                spoil(self)

    options = {"ema_decay": 0.9, "grad_accumulation_factor": 2, "norm": True}
    ends = []
    for each in (Mine, kind):
        for epochs in ([1], [1, 2]):  # The second resumes.
            brain = make(each, checkpointer=Checkpointer(tmp_path / each.__name__), **options)
            brain.fit(epochs, batches(5), batches(2))
        brain.evaluate(batches(1))
        ends.append(brain)
    assert len(names) > 1000
    assert same(*map(everything, ends))
    assert all(getattr(ends[0], name) == {"of": name} for name in names)


def test_an_average_of_losses_by_name_is_read_by_name() -> None:
    class Reading(Players):
        def fit_batch(self, batch: Any) -> Any:
            read.append(self.avg_train_loss)
            return super().fit_batch(batch)

    read: list[Any] = []
    make(Reading).fit([1], batches(2))
    assert read[0] == 0.0
    assert read[1].keys() == {"d", "g"}


@pytest.mark.parametrize("name", sorted(FIXED))
def test_setting_a_name_that_is_fixed_gets_a_sentence(name: str) -> None:
    brain = make()
    with pytest.raises(
        AttributeError, match=f"{name} cannot be set: {re.escape(FIXED[name][:20])}"
    ):
        setattr(brain, name, 3)


@pytest.mark.parametrize("name", sorted(OWN))
def test_an_attribute_that_the_constructor_sets_is_not_lost(name: str) -> None:
    class Early(Regressor):
        def __init__(self) -> None:
            setattr(self, name, {})
            super().__init__()

    class Mixin:
        pass

    told = f"Early.{name} (is set by super|cannot be set: |is called in place)"
    with pytest.raises(AttributeError, match=told):
        Early()
    with pytest.raises(AttributeError, match=f"Late.{name} cannot be set in a class: "):
        type("Late", (Regressor,), {name: {}})
    setattr(Mixin, name, {})
    with pytest.raises(AttributeError, match=f"Mixed.{name} cannot be set in a class: "):
        type("Mixed", (Mixin, Regressor), {})


def test_arguments_may_be_set_before_the_constructor_gets_them(tmp_path: Path) -> None:
    class Early(Regressor):
        def __init__(self, modules: Any, opt_class: Any, hparams: Any, checkpointer: Any) -> None:
            self.modules, self.opt_class, self.hparams = modules, opt_class, hparams
            self.checkpointer, self.width = checkpointer, self.hparams["width"]
            super().__init__(modules, opt_class, hparams, checkpointer=checkpointer)

    given = Checkpointer(tmp_path)
    brain = Early({"net": net()}, partial(torch.optim.SGD, lr=0.1), {"width": 3}, given)
    brain.fit([1], batches(2))
    assert (brain.width, brain.hparams.width, brain.checkpointer) == (3, 3, given)
    assert given.list_checkpoints()


def test_a_subclass_may_be_called_brain_but_for_private_names() -> None:
    trainer_brain = Regressor

    class Brain(trainer_brain):
        def on_fit_start(self) -> None:
            self._stage, self.stage = 1, 2

    make(Brain).fit([1], batches(1))
    with pytest.raises(AttributeError, match=r"_Brain uses __feed, __stage: in a class of this"):

        class _Brain(trainer_brain):
            def __feed(self) -> None:
                self.__stage = 3


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_subclass_may_take_back_a_method_of_brain(name: str) -> None:
    assert getattr(type("Again", (Players,), {name: vars(Brain)[name]}), name)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_may_be_meant_as_a_run_option_is_refused_and_the_rest_is_the_users(name: str) -> None:
    brain = make()
    for value in ("fp32",) if name == "precision" else (1, None, "1"):
        with pytest.raises(AttributeError, match=f"{name} cannot be set: it is a run option"):
            setattr(brain, name, value)
    for own in (object(), [0.5], torch.ones(1), *((0.5, None) if name == "precision" else ())):
        setattr(brain, name, own)
        assert getattr(brain, name) is own


def test_a_driver_that_cannot_be_called_is_refused() -> None:
    brain = make()
    with pytest.raises(AttributeError, match="driver is called in place of .*; 'taxi' cannot be"):
        brain.driver = "taxi"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_is_exchanged_by_a_function_and_by_nothing_else(name: str) -> None:
    brain = make()
    with pytest.raises(AttributeError, match=f"{name} is a method of Brain; 3 would replace it"):
        setattr(brain, name, 3)
    setattr(brain, name, getattr(brain, name))


def test_every_name_of_the_list_can_be_set_or_says_why_not() -> None:
    fixed, methods, counters, plain = set(FIXED), set(METHODS), set(), set()
    for name in sorted(public_names() - fixed - methods):
        brain = make()
        if isinstance(getattr(Brain, name, None), property):
            setattr(brain, name, 7)
            assert getattr(brain, name) == 7
            counters.add(name)
        else:
            setattr(brain, name, getattr(brain, name, None))
            plain.add(name)
        brain.fit([1], batches(2))
    assert counters == {"epoch", "step", "optimizer_step", "nonfinite_count"}
    assert fixed | methods | counters | plain == public_names()
