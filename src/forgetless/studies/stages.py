"""The seven stages of a run. Each leaves one artefact, and is skipped when that is there.

    base scores   scores/base/     what the untouched base can do; measured once a study
    statistics    (shared)         activations of the knowledge to keep; collected once a study
    start         start/           the adapter before its first step, and scores/step0/
    train         native/, model/  the trained adapter, lossless; the model for full fine-tuning
    export        adapter/         the same as a plain PEFT LoRA for the untouched base
    evaluate      scores/final/    what the trained model can do
    analyse       analysis.json    how far the weights moved

In a sequence a run starts from another one's weights; between train and export its adapter is
repaired, if that is asked for, and what its layers read on all tasks so far is left in inputs/.

A recipe may ask for two more, see `beside`: aftercare (repairs, the dial and comparators, measured
beside the trained weights) and spectra. Every stage reads what it needs from the disk, so a run
that was killed and continued computes the same numbers as one that was not.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from forgetless.adapters.attachment import attach
from forgetless.adapters.earlier import use_together
from forgetless.adapters.folders import export, load, save, save_plain
from forgetless.adapters.layer import delta_weights
from forgetless.adapters.plain import plain_lora, summed
from forgetless.adapters.repair import STRENGTHS, Earlier, Repairs
from forgetless.adapters.settings import AdapterSettings
from forgetless.core.cache import cached_spectra
from forgetless.core.errors import UserError
from forgetless.core.files import lock, new_file, new_folder, read_json, remove, write_json
from forgetless.core.hashing import checksum, first_damaged
from forgetless.core.method import Factors
from forgetless.core.processes import Processes
from forgetless.core.progress import duration
from forgetless.core.tensors import read_tensors, write_tensors
from forgetless.data.modality import Batch, Rows
from forgetless.models.heads import is_of_new_head
from forgetless.models.load import load_model, meta_model
from forgetless.models.targets import target_layers
from forgetless.models.weights import linear_weight, weight_shape
from forgetless.recipes.identity import base_words, input_keys
from forgetless.recipes.measuring import probed
from forgetless.recipes.recipe import Recipe
from forgetless.scores.cache import ScoreCache, digest
from forgetless.scores.files import Phase, read_score, write_score
from forgetless.statistics.gradients import Gradients
from forgetless.statistics.moments import Statistics
from forgetless.studies.beside import Beside
from forgetless.studies.card import write_run_card
from forgetless.studies.folder import RunFolder, adapter_checksums, is_kept, note_files, planned
from forgetless.studies.inputs import Collecting, load_inputs
from forgetless.studies.material import Material
from forgetless.studies.out_of_memory import naming_what_takes_less
from forgetless.tasks import Task, TaskResult
from forgetless.tasks.journal import resuming, sharing
from forgetless.training.devices import gathered, is_sharded
from forgetless.training.forgetting import from_settings
from forgetless.training.launch import this_launch
from forgetless.training.loop import train
from forgetless.training.weights import put_back, trained_copy, trained_weights

_log = logging.getLogger(__name__)

SMALL_INPUT = 1024
"""Inputs of a layer up to which its tail energy is worth an eigendecomposition."""


@dataclass(frozen=True)
class Event:
    """Something that happened in a run, for a listener.

    Attributes:
        run_id, name: which run.
        stage: one of the seven, or "data" before them, "done", "failed".
        message: what happened, in words; empty for a mere step.
        step, steps: how far training is; 0 outside training.
    """

    run_id: str
    name: str
    stage: str
    message: str = ""
    step: int = 0
    steps: int = 0


Listener = Callable[[Event], None]

FIRST_MINUTE = 60.0
"""Seconds of training after which its length is foretold."""


@dataclass
class Stages(Material):
    """The stages of one run."""

    listen: Listener
    processes: Processes = field(default_factory=Processes)

    def run(self, *, evaluate: bool) -> None:
        """All stages in order; the measuring ones only when asked.

        Several processes collect statistics, train and measure together. All else is the first
        one's work, for which the others wait, and it alone writes.
        """
        self.processes.first(self.require_fitting_data)
        if self.prompted is not None and not self._is_trained():
            self.tell("data", self.prompted)
            self._note(lambda: {"prompts": self.prompted})
        if evaluate:
            self._note(lambda: {"tasks": {task.name: kind for task, kind in self.tasks}})
            self._timed("base scores", self.base_scores, together=True)
        self._timed("statistics", self.collect_statistics, together=True)
        self._timed("start", self.start)
        if evaluate:
            self._timed("step 0", self.step0, together=True)
        self._timed("train", self.train, together=True)
        if self.recipe.is_repaired:
            self._timed("repair", self.repair)
        if self.hands_on:
            self._timed("inputs", self.add_inputs)
        self._timed("export", self.export)
        if evaluate:
            self._timed("evaluate", self.evaluate, together=True)
            recipe = self.recipe
            beside = recipe.repair and not recipe.is_repaired
            if beside or recipe.dial or recipe.comparators or recipe.residual:
                self._timed("aftercare", partial(self._alone, Beside(self).aftercare))
        self._timed("analyse", self.analyse)
        if self.recipe.spectra:
            self._timed("spectra", partial(self._alone, Beside(self).spectra))
        self.processes.first(self._finish)

    def _finish(self) -> None:
        """Write the cards, and remove what a process left that was killed between two files."""
        for unfinished in self.folder.path.rglob("*.partial.jsonl"):
            remove(unfinished)
        write_run_card(self.folder)
        if taken := self.folder.taken:
            write_run_card(self.folder, self.folder.repaired, repaired=taken)

    def _timed(self, stage: str, work: Callable[[], str | None], *, together: bool = False) -> None:
        """Do a stage; its time is kept only where it had something to do."""
        started = time.perf_counter()
        with naming_what_takes_less(stage):
            message = work() if together else self.processes.first(work)
        if message is not None:
            seconds = round(time.perf_counter() - started, 3)
            self._note(lambda: {"seconds": {**self.record.get("seconds", {}), stage: seconds}})
            self.tell(stage, f"{message} ({seconds:.1f} s)")

    def _alone(self, work: Callable[[], str | None]) -> str | None:
        """Work that one process does by itself, with nobody else's statistics to wait for."""
        if self.processes.count > 1:
            return "left for one process: run the same recipe again without a launcher"
        return work()

    def _note(self, changes: Callable[[], Mapping[str, Any]]) -> None:
        """Change entries of run.json."""
        self.processes.first(lambda: self.folder.update(**changes()))

    def tell(self, stage: str, message: str = "", step: int = 0, steps: int = 0) -> None:
        """Pass an event on to the listener."""
        name = self.recipe.name or self.recipe.adapter.method
        self.listen(Event(self.folder.path.name, name, stage, message, step, steps))

    # ------------------------------------------------------------------------------- measuring

    def _missing(self, phase: Phase, run: RunFolder | None = None) -> list[tuple[Task, str]]:
        """The tasks without an intact score; one that has changed has another fingerprint."""
        run = run or self.folder

        def names() -> set[str]:
            missing = set()
            for task, _ in self.tasks:
                try:
                    files = run.scores(phase, task.name), run.items(phase, task.name)
                    score, _ = read_score(*files)
                except UserError as damage:
                    _log.warning("%s", damage)
                    score = {}
                if score.get("fingerprint") != task.fingerprint:
                    missing.add(task.name)
            return missing

        missing = self.processes.first(names)
        return [(task, kind) for task, kind in self.tasks if task.name in missing]

    def _measure(
        self, run: RunFolder, phase: Phase, task: Task, kind: str, model: Any, weights: Path
    ) -> None:
        """Score a model and write the result; an attempt that was stopped is resumed."""
        # For an adapter the reference is the same model with the adapter off.
        reference = self._load_base() if self.full and task.needs_reference else None
        unfinished = run.scores(phase, task.name).with_suffix(".partial.jsonl")
        key = f"{task.fingerprint} {weights.stat().st_mtime_ns}"
        with sharing(self.processes), resuming(unfinished, key):
            result = task.evaluate(model, self.processor, reference=reference)

        def write() -> None:
            items = [item.to_json() for item in result.items]
            files = run.scores(phase, result.task), run.items(phase, result.task)
            write_score(*files, {**result.to_json(), "kind": kind}, items)
            remove(unfinished)

        self.processes.first(write)

    def _copy(self, task: Task, kind: str, source: tuple[Path, Path], phase: Phase) -> None:
        """Take over a score that was measured elsewhere."""
        files = self.folder.scores(phase, task.name), self.folder.items(phase, task.name)

        def write() -> None:
            content, lines = read_score(*source)
            write_score(*files, {**content, "kind": kind}, lines)

        self.processes.first(write)

    def base_scores(self) -> str | None:
        """Score the untouched base, or take the scores that another run of the study measured."""
        missing = self._missing("base")
        cache = ScoreCache(self.shared / "scores")
        base = base_words(self.recipe, self.new_classes)
        for task, kind in missing:
            ask = partial(self._ask_base, task)
            cache.result(task, *base, measure=ask, processes=self.processes)
            self._copy(task, kind, cache.paths(task, *base), "base")
        return _counted(missing, "task") if missing else None

    def _ask_base(self, task: Task) -> TaskResult:
        return task.evaluate(self._base(), self.processor, reference=self._base())

    def step0(self) -> str | None:
        """Score the model before its first step.

        Where its logits were seen to equal the base's bit for bit (see `start`), and for full
        fine-tuning, the base's scores are its scores; after another run, those that it ended with.
        """
        missing, before = self._missing("step0"), self.before
        if not missing:
            return None
        said, run, unknown = "the base's own scores", self.folder, missing[:0]
        phase: Phase = "base"
        if before is not None:
            said, run, phase = "those of the run before", before, "final"
            unknown = self._missing(phase, run)
        elif not (self.full or self.record["start"]["equals_base"]):
            unknown = missing
        for task, kind in missing:
            if (task, kind) in unknown:
                weights, model = self._at_start()
                self._measure(self.folder, "step0", task, kind, model, weights)
            else:
                known = run.scores(phase, task.name), run.items(phase, task.name)
                self._copy(task, kind, known, "step0")
        return _counted(unknown, "task") if unknown else said

    def _at_start(self) -> tuple[Path, Any]:
        """The weights before the first step, as they were written, and the model with them."""
        if self.full and self.before is not None:
            return self.before.model, self._trained_model(self.before)
        start = self.folder.start
        return start, self._model("start", lambda: use_together(load(self._below(), start)))

    def evaluate(self) -> str | None:
        """Score the trained model, and its weights on the way, as they were read back."""
        on_the_way = [self.folder.point(step) for step in self.folder.points]
        missing = [
            (run, *each)
            for run in (*on_the_way, self.folder)
            for each in self._missing("final", run)
        ]
        for run, task, kind in missing:
            model = self._trained_model(run)
            self._measure(run, "final", task, kind, model, self._weights(run))
        return _counted(missing, "measurement" if on_the_way else "task") if missing else None

    # -------------------------------------------------------------------------------- training

    @cached_property
    def _inputs(self) -> dict[str, Path]:
        """Where each need of the run lies."""
        keys = {} if self.full else input_keys(self.recipe)
        sequence = self.recipe.sequence
        if "second_moment" in keys and sequence is not None and sequence.after is not None:
            added = sequence.model_dump(include={"after", "earlier"})
            keys["second_moment"] = {"text": keys["second_moment"], **added}
        return {need: self._place(key) for need, key in keys.items()}

    def _place(self, key: Mapping[str, Any]) -> Path:
        """Where statistics lie that are decided by a key."""
        return self.shared / "statistics" / digest(json.dumps(key, sort_keys=True))

    def collect_statistics(self) -> str | None:
        """Collect what the method needs to know of the text to keep and of the new task."""
        if self.processes.first(self._is_started):
            return None
        layers = []
        for need, folder in self._inputs.items():
            if need == "second_moment" and self.before is not None:
                layers.append(self._written(folder, lambda unfinished: self._kept()[0]))
            else:
                layers.append(self._collect(need, folder))
        return f"{max(layers)} layers" if any(layers) else None

    def _collect(self, need: str, folder: Path) -> int:
        """Collect one need on the run's own texts, as the base reads them; of how many layers."""
        collecting = Collecting.of(self.recipe)
        return self._written(
            folder,
            lambda unfinished: collecting.collect(need, self._base(), self.processor, unfinished),
        )

    def _written(self, folder: Path, make: Callable[[Path], Statistics | Gradients]) -> int:
        """Write statistics where there are none yet; of how many layers.

        ``make`` is given a folder for what is unfinished, from which it may go on.
        """
        is_first = self.processes.is_first
        with lock(folder.with_suffix(".lock")) if is_first else nullcontext():
            if self.processes.first(lambda: is_kept(folder)):
                return 0
            unfinished = folder.with_suffix(".unfinished")
            found = make(unfinished)
            self.processes.wait_for_everyone()  # until none needs what is unfinished
            if is_first:
                with new_folder(folder) as new:
                    found.save(new)
                    note_files(new)
                remove(unfinished)
        return len(found)

    def _kept(self) -> tuple[Statistics, float]:
        """What is to be kept, the base's text and the inputs of earlier tasks, and their share."""
        place = self._place(input_keys(self.recipe, "second_moment")["second_moment"])
        self._collect("second_moment", place)
        text, sequence = Statistics.load(place), self.recipe.sequence
        if self.before is None or sequence is None:
            return text, 0.0
        inputs = self._read_earlier()
        count = sequence.earlier.weight * inputs.metadata["tokens"]
        share = min(count / (count + text.metadata["tokens"]), sequence.earlier.most)
        return Statistics.mixture([(text, 1 - share), (inputs, share)]), share

    def _read_earlier(self) -> Statistics:
        """The inputs of the earlier tasks, collected now where nobody was expected to ask."""
        assert self.before is not None
        if not self.before.inputs.exists():
            Stages(self.before, Recipe.load(self.before.recipe), self.listen).add_inputs()
        return Statistics.load(self.before.inputs)

    def add_inputs(self) -> str | None:
        """Add what the trained model's layers read on its data to that of the tasks before.

        Every token counts the same. Of the tasks before nothing but these statistics is read.
        """
        with lock(self.folder.inputs.with_suffix(".lock")):
            if self.folder.inputs.exists():
                return None
            found = self._read_as_trained(self._trained_model(self.folder))
            if self.before is not None:
                found = found + self._read_earlier()
            with new_folder(self.folder.inputs) as folder:
                found.save(folder)
        return f"{len(found)} layers"

    def _read_as_trained(self, model: Any) -> Statistics:
        """What the layers of a trained model read on the training data."""
        collecting = Collecting.of(self.recipe)
        found = collecting.collect("task_moment", model, self.processor, adapters_on=True)
        assert isinstance(found, Statistics)
        return found

    def _is_started(self) -> bool:
        """Whether the start was written, and what it was like is known."""
        written = self._weights(self.folder).exists() or self.folder.start.exists()
        return written and (self.full or "start" in self.record)

    def start(self) -> str | None:
        """Attach the adapter and write it down as it is before the first step."""
        if self.full or self._is_started():
            return None
        if not self.recipe.starts_anew and self.before is not None:
            return self._continue(self.before)
        inputs = load_inputs(self._inputs)
        model = self._base() if self.before is None else self._below()
        sizes = {
            name: weight_shape(layer)[1]
            for name, layer in target_layers(model, self.recipe.adapter.target_modules).items()
        }
        probe = self.modality.probe(model)
        before = _logits(model, probe)
        with self._spectra(model):
            model = attached(self.recipe.adapter, model, inputs, self._seed_of_start)
        self._held = None  # it is no longer the base
        same = torch.equal(_logits(use_together(model).eval(), probe), before)
        with new_folder(self.folder.start) as folder:
            save(model, folder)
        self.folder.update(
            start={
                "equals_base": same and self.before is None,
                "probe_tokens": before.shape[:-1].numel(),
            },
            statistics=_summary(inputs.get("stats"), self.recipe.adapter.rank, sizes),
        )
        below = "the base" if self.before is None else "what it stands on"
        return f"equals {below} bit for bit" if same else f"differs from {below}"

    @property
    def _seed_of_start(self) -> int:
        """The seed of the recipe; after another run one of its own, or all A would be alike."""
        if self.recipe.after is None:
            return self.recipe.seed
        return int(digest(f"{self.recipe.seed} {self.recipe.after}")[:8], 16)

    def _continue(self, before: RunFolder) -> str:
        """Write down as the start what another run trained."""
        model = load(self._load_base(), before.native, trainable=True)
        with new_folder(self.folder.start) as folder:
            save(model, folder)
        self.folder.update(start={"equals_base": False, "after": before.path.name})
        return f"what {before.path.name} trained"

    def _spectra(self, model: nn.Module) -> AbstractContextManager[object]:
        """Where the runs of a study, if there are several, share slices of the weights' spectra.

        They take at most a tenth of the model's bytes.
        """
        if len(planned(self.folder.path.parent)) < 2:
            return nullcontext()
        most = sum(p.nbytes for p in model.parameters()) / 10
        return cached_spectra(self.shared / "spectra", most)

    def require_fitting_data(self) -> None:
        """Say at once what of the data the base cannot be trained on; measuring may take hours."""
        if self._is_trained():
            return
        self.rows.require_fitting(meta_model(self.recipe.base, bare=True))
        if self.rows.several:  # only the model itself tells whether it keeps them apart
            self.rows.require_fitting(self._base())

    def to_train(self) -> tuple[Any, Rows]:
        """The model before its first step, and the rows to train it on."""
        self._held = None
        # What is to be sharded comes to the devices in shards.
        device = "cpu" if this_launch().strategy == "FSDP2" else "auto"
        if self.full and self.before is not None:
            how = {"device": device, **self.recipe.loading}
            model = load_model(str(self.before.model), **how)
            model = self._with_classes(model)
        else:
            model = self._below(device)
        if not self.full:
            model = load(model, self.folder.start, trainable=True)
            model = use_together(model, trainable=True)
        if self.recipe.training.probe_steps:
            self._probe_head(model)
        return model, self.rows

    def _probe_head(self, model: Any) -> None:
        """Train the new head alone, as the model's features are; or take what that came to."""
        training, file = self.recipe.training, self.folder.probe / "head.safetensors"
        if self.processes.first(lambda: not file.exists()):
            trained = trained_weights(model).items()
            others = [weight for name, weight in trained if not is_of_new_head(model, name)]
            for weight in others:
                weight.requires_grad_(False)
            changes: dict[str, Any] = {
                "learning_rate": training.head_learning_rate or training.learning_rate,
                "steps": training.probe_steps,
                "epochs": None,
                "tokens": None,
                "measure_at": [],
                "head_learning_rate": None,
                "probe_steps": 0,
                "loraplus_ratio": 1.0,
            }
            alone = training.model_copy(update=changes)
            train(model, self.processor, self.rows, alone, self.folder.probe, seed=self.recipe.seed)

            def write() -> None:
                with new_file(file) as new:
                    write_tensors(trained_copy(model, "cpu"), new)

            self.processes.first(write)
            for weight in others:
                weight.requires_grad_(True)
        put_back(model, read_tensors(file))

    def train(self) -> str | None:
        """Train, from the newest checkpoint if there is one, and write the result down."""
        if self.processes.first(self._is_trained):
            self.processes.first(self._require_undamaged)
            self.processes.first(self._finish_training)
            return None
        recipe, (model, rows) = self.recipe, self.to_train()
        result = train(
            model,
            self.processor,
            rows,
            recipe.training,
            self.folder.path,
            seed=recipe.seed,
            penalties=self._penalties,
            probes=from_settings(probed(recipe, self.own_text), recipe.data.said),
            on_step=self._on_step(),
            on_point=lambda step: self._save(model, self.folder.point(step)),
        )
        if self.recipe.is_repaired:
            self.processes.first(lambda: self._save_unrepaired(model))
        else:
            self._save(model, self.folder)
            self._note(lambda: {"weights": adapter_checksums(self._weights(self.folder))})
        self.processes.first(lambda: write_json(self.folder.training, asdict(result), checked=True))
        self.processes.first(self._finish_training)
        over = f"; {result.exceeded}" if result.exceeded else ""
        return f"{result.steps} steps, loss {result.final_loss:.4g}{over}"

    def _on_step(self) -> Callable[[int, int], None]:
        """What tells of each step and, once the rate is known, how long the run will take."""
        first: tuple[int, float] | None = None
        is_told = False

        def tell(step: int, steps: int) -> None:
            nonlocal first, is_told
            now = time.perf_counter()
            first = first or (step, now)  # which is slow, and not what the others are like
            taken, message = now - first[1], ""
            if taken >= FIRST_MINUTE and first[0] < step < steps and not is_told:
                is_told = True
                left = taken / (step - first[0]) * (steps - step)
                message = f"about {duration(left)} of training left"
                measuring = self.record.get("seconds", {}).get("base scores")
                if measuring:
                    later = measuring * (1 + len(self.recipe.training.measure_at))
                    message += f", and {duration(later)} of measuring if it takes as the base did"
            self.tell("train", message, step, steps)

        return tell

    @property
    def _penalties(self) -> list[dict[str, Any]]:
        """Those of the recipe, and that which keeps the adapter apart from the earlier ones."""
        sequence, found = self.recipe.sequence, self.recipe.penalties
        if sequence is None or sequence.apart is None or self.before is None:
            return found
        folders = [str(self.before.native)]
        apart = {"kind": "orthogonality", "weight": sequence.apart, "normalised": True}
        return [*found, {**apart, "adapters": folders}]

    def _save(self, model: Any, run: RunFolder) -> None:
        """Write the weights as they are now, for `_trained_model`."""
        weights = gathered(model) if is_sharded(model) else None

        def write() -> None:
            with new_folder(self._weights(run)) as folder:
                if self.full:
                    model.save_pretrained(folder, state_dict=weights)
                    self.processor.save_pretrained(folder)
                elif self._earlier is not None:
                    both = summed(self._earlier, plain_lora(model, "default"))
                    save_plain(both, folder, model)
                else:
                    save(model, folder, weights=weights)

        self.processes.first(write)

    def _save_unrepaired(self, model: Any) -> None:
        with new_folder(self.folder.unrepaired) as folder:
            save(model, folder)

    def repair(self) -> str | None:
        """Replace what was trained by its repair, see `forgetless.repair`.

        Kept are the base's text and the inputs of earlier tasks. A new adapter is to do as little
        as it can there; one that was trained on is to do with these inputs what it did before.
        """
        wanted = self.recipe.repair
        if wanted is None or self.folder.native.exists():
            return None
        model = use_together(load(self._below(), self.folder.unrepaired))
        trained, (keep, share) = plain_lora(model, "default"), self._kept()
        task = None if wanted.task is None else self._read_as_trained(model)
        earlier = None
        if self.before is not None and self._earlier is None:
            before = plain_lora(load(self._load_base(), self.before.native), "default")
            earlier = Earlier(before.factors, self._read_earlier(), share)
        strengths = STRENGTHS if wanted.strength == "auto" else wanted.strength
        made = Repairs(trained.factors, keep, task, strengths, earlier=earlier)
        strength = made.foreseen() if wanted.strength == "auto" else strengths[0]
        A = made.A(strength)
        repaired = {name: Factors(A[name], old.B) for name, old in trained.factors.items()}
        trained = trained.with_factors(repaired)
        if self._earlier is not None:
            trained = summed(self._earlier, trained)
        with new_folder(self.folder.native) as folder:
            save_plain(trained, folder, model)
        remove(self.folder.unrepaired)
        self.folder.update(weights=adapter_checksums(self.folder.native))
        self._held = None
        told = made.forecast(strength)
        self.folder.update(repair={"strength": strength, "earlier_share": share, **asdict(told)})
        return f"strength {strength:g}, {told.kept:.0%} of the disturbance left"

    def _require_undamaged(self) -> None:
        """Raise which file of the trained weights is not as it was written."""
        record = self.record
        self.folder.lines(record)  # which warns of a damaged log
        weights, known = self._weights(self.folder), record.get("weights", {})
        if weights.exists() and not known:  # run.json is another one
            self.folder.update(weights=adapter_checksums(weights))
        damaged = first_damaged(weights, known)
        if damaged is not None:
            raise UserError(
                f"{damaged} is damaged or gone; delete {self.folder.path}, and the same command "
                "trains this run again"
            )

    def _finish_training(self) -> None:
        """Note the result in run.json and remove what only an unfinished training needs."""
        record, file = self.record, self.folder.training
        result = read_json(file, damaged_as_missing=True)
        if not result and "training" in record:
            result = record["training"]
            write_json(file, result, checked=True)
        if result and record.get("training") != result:
            files = {**record["files"], self.folder.log.name: checksum(self.folder.log)}
            self.folder.update(training=result, files=files)
        remove(self.folder.checkpoints)
        remove(self.folder.probe)
        if not self.full and self.record["start"]["equals_base"]:
            remove(self.folder.start)

    # ---------------------------------------------------------------------------- the results

    def export(self) -> str | None:
        """Write the adapter as a plain PEFT LoRA for the untouched base."""
        rank = self.recipe.export.rank
        known = self.record.get("export", {})
        if self.full or (known.get("requested") == rank and self.folder.adapter.exists()):
            damaged = first_damaged(self.folder.adapter, known.get("files", {}))
            if damaged is None:
                return None
            self.tell("export", f"{damaged} is damaged or gone; exported again")
        with new_folder(self.folder.adapter) as folder:
            report = export(self._trained_model(self.folder), folder, rank)
            write_run_card(self.folder, folder, report.relative_error)
        entry = {"requested": rank, "rank": report.rank, "relative_error": report.relative_error}
        self.folder.update(export={**entry, "files": adapter_checksums(self.folder.adapter)})
        return f"rank {report.rank}, relative error {report.relative_error:.2g}"

    def analyse(self) -> str | None:
        """Measure how far the weights moved, sqrt(sum ||dW||^2) / sqrt(sum ||W||^2)."""
        if read_json(self.folder.analysis, damaged_as_missing=True):
            return None
        moved, size, layers = 0.0, 0.0, {}
        for name, weight, delta in self._deltas():
            squares = float(delta.double().square().sum()), float(weight.double().square().sum())
            moved, size = moved + squares[0], size + squares[1]
            layers[name] = (squares[0] / squares[1]) ** 0.5 if squares[1] else None
        update = (moved / size) ** 0.5
        write_json(
            self.folder.analysis, {"relative_update": update, "layers": layers}, checked=True
        )
        return f"weights moved by {update:.2%}"

    def _deltas(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(layer, W, delta W) of every target layer."""
        model = self._trained_model(self.folder)
        if not self.full:
            yield from delta_weights(model)
            return
        targets = self.recipe.adapter.target_modules
        before = target_layers(self._load_base(), targets)
        for name, layer in target_layers(model, targets).items():
            weight = linear_weight(before[name]).detach().float()
            yield name, weight, linear_weight(layer).detach().float() - weight


def attached(
    settings: AdapterSettings, model: Any, inputs: Mapping[str, Any], seed: int
) -> PeftModel:
    """The model with the adapter of a recipe on it.

    `inputs` are the arguments of `attach` that hold what the method needs.
    """
    given = settings.model_dump(exclude={"method", "options", "head"})
    return attach(model, settings.method, seed=seed, **given, **inputs, **settings.options)


@torch.no_grad()
def _logits(model: nn.Module, inputs: Batch) -> Tensor:
    logits: Tensor = model(**inputs).logits
    return logits


def _summary(
    statistics: Statistics | None, rank: int, sizes: Mapping[str, int]
) -> dict[str, Any] | None:
    """What run.json says of statistics; the tail energy where inputs, by `sizes`, are small."""
    if statistics is None:
        return None
    one_of_each = [group[0] for group in statistics.shared_inputs]
    small = [layer for layer in one_of_each if sizes[layer] <= SMALL_INPUT]
    tails = [statistics[layer].tail_energy(rank) for layer in small]
    return {**statistics.metadata, "tail_energy": sum(tails) / len(tails) if tails else None}


def _counted(things: Sized, noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"
