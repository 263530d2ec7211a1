"""Two processes do what one does: statistics, training, resume, files; under every strategy."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
from accelerate import Accelerator, PartialState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from forgetless.adapters.attachment import attach
from forgetless.core.errors import UserError
from forgetless.core.files import read_json, read_jsonl, write_json
from forgetless.data.examples import load_examples
from forgetless.models.load import load_model, load_tokenizer
from forgetless.statistics.moments import Statistics
from forgetless.studies.folder import RunFolder
from forgetless.studies.run import run
from forgetless.training import checkpoints
from forgetless.training.devices import gathered, join, shard
from forgetless.training.launch import Launch, Strategy, this_launch
from forgetless.training.log import Record
from forgetless.training.loop import train
from forgetless.training.settings import TrainingSettings
from forgetless.training.zero import Zero
from tests.tiny import recipe_of

pytest_plugins = ["tests.tiny_fixtures", "tests.quick_python"]

STRATEGIES = get_args(Strategy)

ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
"""Of stage 2, which is accelerate's default."""

KILLED_AFTER = 5
"""The step after which the second process dies in the tests of that."""


def _environment(rank: int, port: int, strategy: Strategy) -> dict[str, str]:
    """What a launcher would set."""
    sharded = {
        "DDP": {},
        "FSDP2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
        "ZeRO-1": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
        "ZeRO-2": ZERO,
    }
    return sharded[strategy] | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def _process(
    rank: int, port: int, strategy: Strategy, work: Callable[..., None], *arguments: Any
) -> None:
    os.environ.update(_environment(rank, port, strategy))
    this_launch.cache_clear()
    PartialState._reset_state()
    torch.set_num_threads(1)
    work(*arguments)


def two_processes(strategy: Strategy, work: Callable[..., None], *arguments: Any) -> list[int]:
    """The exit codes of two processes that work together; forked, so that nothing is imported."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    given = [(rank, port, strategy, work, *arguments) for rank in range(2)]
    team = [fork.Process(target=_process, args=each) for each in given]
    gc.freeze()  # or the first collection in each copies all that there is
    for process in team:
        process.start()
    for process in team:
        process.join(timeout=600)
        process.kill()
    return [process.exitcode if process.exitcode is not None else -1 for process in team]


def run_all(recipes: dict[str, Any], out: Path) -> None:
    """Run recipes, each into a study of its name."""
    for name, recipe in recipes.items():
        run(recipe, out, name)


def the_run(out: Path, name: str) -> RunFolder:
    (path,) = (out / name).glob("*/run.json")
    return RunFolder(path.parent)


def losses(run: RunFolder) -> list[float]:
    return [line["loss"] for line in read_jsonl(run.log) if "loss" in line]


def tokens(run: RunFolder) -> list[int]:
    return [line["tokens"] for line in read_jsonl(run.log) if "tokens" in line]


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    folder = run.native if run.native.exists() else run.model
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def recipes(tiny_base: Path, tiny_files: Path) -> dict[str, Any]:
    """An adapter whose last batches of an epoch have one row, and a whole model with the rest."""
    adapter = recipe_of(
        tiny_base,
        tiny_files,
        **{
            "adapter.method": "lora_null_v1",
            "calibration.source": "self",
            "data.limit": 21,
            "training.steps": None,
            "training.epochs": 1.5,
            "training.warmup_ratio": 0.0,
        },
    )
    whole = recipe_of(
        tiny_base,
        tiny_files,
        **{
            "adapter": {"method": "full"},
            "training.learning_rate": 1e-3,
            "training.gradient_accumulation": 2,
            "training.steps": 6,
            "tasks": {},
        },
    )
    return {"adapter": adapter, "whole": whole}


@pytest.fixture(scope="module")
def mixed(tiny_base: Path, tiny_files: Path) -> dict[str, Any]:
    """Everything that needs the whole model in a process, or another order of the rows."""
    changes = {
        "adapter.method": "lora",
        "data": {
            "train": [
                {"path": str(tiny_files / "train.jsonl"), "weight": 3},
                {"path": str(tiny_files / "old.txt"), "weight": 1},
            ],
            "max_length": 48,
        },
        "training.steps": 10,  # of 8 an epoch
        "penalties": [
            {"kind": "kl", "weight": 0.5, "source": str(tiny_files / "old.txt"), "samples": 8},
            {"kind": "l2_start", "weight": 0.1},
        ],
        "probes": {"forgetting": [str(tiny_files / "old.txt")], "every": 4, "max_kl": 9.0},
        "tasks": {},
    }
    return {"mixed": recipe_of(tiny_base, tiny_files, **changes)}


@pytest.fixture(scope="module")
def one(
    recipes: dict[str, Any], mixed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The runs of one process."""
    out = tmp_path_factory.mktemp("one")
    run_all(recipes | mixed, out)
    return out


def require_deepspeed() -> None:
    """Skip a test where DeepSpeed is missing; not imported here, for processes are forked."""
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")


Several = Callable[[Strategy], Path]


@pytest.fixture(scope="module")
def several(
    recipes: dict[str, Any], mixed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Several:
    """Gives the folder with the runs of two processes under a strategy."""

    @cache
    def runs_under(strategy: Strategy) -> Path:
        if strategy.startswith("ZeRO"):
            require_deepspeed()
        out = tmp_path_factory.mktemp(strategy)
        asked = recipes | mixed if strategy in ("DDP", "ZeRO-2") else recipes
        assert two_processes(strategy, run_all, asked, out) == [0, 0]
        return out

    return runs_under


CASES: list[tuple[Strategy, str]] = [
    ("DDP", "adapter"),
    ("DDP", "whole"),
    ("DDP", "mixed"),
    ("FSDP2", "adapter"),
    ("FSDP2", "whole"),
    ("ZeRO-1", "adapter"),
    ("ZeRO-1", "whole"),
    ("ZeRO-2", "adapter"),
    ("ZeRO-2", "whole"),
    ("ZeRO-2", "mixed"),
]


@pytest.mark.parametrize(("strategy", "name"), CASES)
def test_two_processes_train_as_one(
    one: Path, several: Several, strategy: Strategy, name: str
) -> None:
    expected, found = the_run(one, name), the_run(several(strategy), name)
    assert found.path.name == expected.path.name
    assert losses(found) == pytest.approx(losses(expected), abs=1e-5)
    assert tokens(found) == tokens(expected)
    mine, theirs = weights(expected), weights(found)
    assert mine.keys() == theirs.keys()
    for key, weight in mine.items():
        torch.testing.assert_close(theirs[key], weight, atol=2e-4, rtol=0)
    for file in ("adapter/adapter_model.safetensors", "analysis.json"):
        assert (found.path / file).exists() == (expected.path / file).exists()


@pytest.mark.parametrize("strategy", ["DDP", "FSDP2"])
def test_what_is_measured_is_the_same(one: Path, several: Several, strategy: Strategy) -> None:
    (theirs,) = (several(strategy) / "adapter/shared/statistics").glob("*/")
    (mine,) = (one / "adapter/shared/statistics").glob("*/")
    expected, found = Statistics.load(mine), Statistics.load(theirs)
    for layer in expected:
        wanted = expected[layer].second_moment
        error = (found[layer].second_moment - wanted).norm() / wanted.norm()
        assert error < 1e-10
    scores = [
        {file.name: read_json(file)["value"] for file in run.path.glob("scores/*/*.json")}
        for run in (the_run(one, "adapter"), the_run(several(strategy), "adapter"))
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    items = [
        {file.name: read_jsonl(file) for file in the_run(out, "adapter").path.glob("items/base/*")}
        for out in (one, several(strategy))
    ]
    assert items[0]
    assert items[0] == items[1]


def test_probes_of_two_processes_give_what_one_gives(one: Path, several: Several) -> None:
    mine, theirs = (
        [line["probe"] for line in read_jsonl(the_run(out, "mixed").log) if "probe" in line]
        for out in (one, several("DDP"))
    )
    assert len(mine) == len(theirs) == 4
    for expected, found in zip(mine, theirs, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


def test_a_run_says_what_ran_where(one: Path, several: Several) -> None:
    alone = read_json(the_run(one, "adapter").record)["hardware"]
    assert alone["processes"] == 1
    assert "strategy" not in alone
    for strategy in STRATEGIES if find_spec("deepspeed") else STRATEGIES[:2]:
        hardware = read_json(the_run(several(strategy), "adapter").record)["hardware"]
        assert hardware["processes"] == 2
        assert hardware["strategy"] == strategy
        assert hardware["backend"] == "gloo"
        assert len(hardware["devices"]) == 2


# ---- one process dies ----------------------------------------------------------------------------


def die_in_the_second(recipes: dict[str, Any], out: Path) -> None:
    """Train until the second process is killed, as for want of memory."""
    if os.environ["RANK"] == "1":
        end_of_step = Record.on_step_end

        def dying(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == KILLED_AFTER:
                os.kill(os.getpid(), signal.SIGKILL)
            end_of_step(self, args, state, control, **kwargs)

        Record.on_step_end = dying  # type: ignore[method-assign]
    run_all(recipes, out)


@pytest.mark.parametrize(
    ("strategy", "name"),
    [("DDP", "adapter"), ("FSDP2", "whole"), ("ZeRO-1", "adapter"), ("ZeRO-2", "whole")],
)
def test_a_killed_process_ends_all_and_nothing_is_lost(
    recipes: dict[str, Any],
    several: Several,
    tmp_path: Path,
    strategy: Strategy,
    name: str,
) -> None:
    undisturbed, asked = the_run(several(strategy), name), {name: recipes[name]}
    codes = two_processes(strategy, die_in_the_second, asked, tmp_path)
    assert codes == [1, -signal.SIGKILL]
    run = the_run(tmp_path, name)
    record = read_json(run.record)
    assert record["status"] == "failed"
    assert "another process of this launch has ended" in record["reason"]
    newest = checkpoints.newest(run.checkpoints)
    assert newest is not None
    assert checkpoints.step_of(newest) == 4
    elsewhere = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-one"))
    assert two_processes(strategy, run_all, asked, tmp_path) == [0, 0]
    assert read_json(run.record)["training"]["resumed_from"] == 4
    assert losses(run) == losses(undisturbed)
    mine, theirs = weights(undisturbed), weights(run)
    assert all(torch.equal(theirs[key], weight) for key, weight in mine.items())
    run_all(asked, elsewhere)  # one process can go on as well
    run = the_run(elsewhere, name)
    assert read_json(run.record)["training"]["resumed_from"] == 4
    assert losses(run) == pytest.approx(losses(undisturbed), abs=1e-5)


# ---- what a launcher says ------------------------------------------------------------------------


def test_a_launch_is_read_from_the_environment() -> None:
    assert Launch.of({}) == Launch(1, 0, None)
    assert Launch.of({"WORLD_SIZE": "1", "RANK": "0"}) == Launch(1, 0, None)
    assert Launch.of(_environment(1, 1, "DDP")) == Launch(2, 1, "DDP")
    for strategy in STRATEGIES:
        assert Launch.of(_environment(0, 1, strategy)) == Launch(2, 0, strategy)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "not 3; give --zero_stage 2, or .*FSDP2"),
        (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"}, "the recipe says what it would"),
        (
            ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            "leave --offload_optimizer_device out",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, "add --fsdp_version 2"),
        (
            {"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "turn offload_params off",
        ),
    ],
)
def test_a_launch_that_would_not_train_rightly_is_refused(
    changed: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Launch.of(_environment(0, 1, "DDP") | changed)


def test_what_does_not_go_with_a_launch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def problems(launch: Launch, probes: bool = False, **changes: Any) -> list[str]:
        settings = TrainingSettings(steps=1, **changes)
        return list(launch.obstacles(settings, penalties=probes, probes=probes))

    assert problems(Launch(), probes=True, batch_size=3, optimizer="adafactor", compile=True) == []
    assert problems(Launch(2, 0, "DDP"), probes=True, batch_size=4, optimizer="adafactor") == []
    (problem,) = problems(Launch(4, 0, "DDP"), batch_size=6)
    assert problem == (
        "training.batch_size: 6 rows, which are those of all processes together, cannot be shared "
        "equally by 4; take a multiple"
    )
    found = problems(Launch(2, 0, "FSDP2"), probes=True, optimizer="adafactor", compile=True)
    keys = [problem.partition(":")[0] for problem in found]
    assert keys == ["penalties", "probes", "training.optimizer", "training.compile"]
    monkeypatch.setattr("forgetless.training.launch.find_spec", lambda name: None)
    found = problems(Launch(2, 0, "ZeRO-1"), probes=True, optimizer="adafactor", compile=True)
    assert found[0].endswith("not installed: pip install 'forgetless[deepspeed]'")
    keys = [problem.partition(":")[0] for problem in found[1:]]
    assert keys == ["training.optimizer", "training.compile"]


def test_other_commands_are_for_one_process(tmp_path: Path, python: str) -> None:
    environment = os.environ | _environment(0, 1, "DDP")
    command = [python, "-m", "forgetless", "study", str(tmp_path / "study.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'study' is the work of one process" in done.stderr


def hold_a_part(base: str, out: Path) -> None:
    """Shard a model, and write down how much of it is here, and what is gathered."""
    processes, model = join(), load_model(base)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    shard(model)
    here = sum(cast(Any, weight)._local_tensor.numel() for weight in model.parameters())
    whole = gathered(model)
    same = all(torch.equal(whole[name], weight) for name, weight in before.items() if whole)
    write_json(
        out / f"{processes.index}.json", {"here": here, "gathered": len(whole), "same": same}
    )


def test_every_process_holds_its_part_of_every_weight(tiny_base: Path, tmp_path: Path) -> None:
    assert two_processes("FSDP2", hold_a_part, str(tiny_base), tmp_path) == [0, 0]
    first, second = (read_json(tmp_path / f"{rank}.json") for rank in range(2))
    model = load_model(str(tiny_base))
    assert first["here"] + second["here"] == model.num_parameters()
    assert max(first["here"], second["here"]) <= 0.51 * model.num_parameters()
    assert first["gathered"] == len(model.state_dict())
    assert first["same"]
    assert second["gathered"] == 0


def share_the_state(base: str, out: Path) -> None:
    """Move a model by one step, and write down what of the optimiser is here, and what is left."""
    processes, model = join(), load_model(base)
    own = {name: set(vars(weight)) for name, weight in model.named_parameters()}
    accelerator, optimizer = Accelerator(), torch.optim.AdamW(model.parameters())
    zero = Zero(accelerator, model, optimizer, stage=2, max_grad_norm=1.0)
    engine, _ = accelerator.prepare(model, optimizer)
    tokens = torch.arange(8)[None]
    accelerator.backward(engine(input_ids=tokens, labels=tokens).loss)
    here = sum(entry["exp_avg"].numel() for entry in optimizer.state.values())
    whole = optimizer.state_dict()["state"]
    zero.end()
    weights = dict(model.named_parameters())
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())
    found = {
        "here": here,
        "gathered": [list(entry["exp_avg"].shape) for entry in whole.values()],
        "left": hooks + sum(vars(weights[name]).keys() != own[name] for name in own),
        "apart": len({weight.untyped_storage().data_ptr() for weight in weights.values()}),
    }
    write_json(out / f"{processes.index}.json", found)


def test_every_process_holds_its_part_of_the_state(tiny_base: Path, tmp_path: Path) -> None:
    require_deepspeed()
    assert two_processes("ZeRO-2", share_the_state, str(tiny_base), tmp_path) == [0, 0]
    first, second = (read_json(tmp_path / f"{rank}.json") for rank in range(2))
    weights = list(load_model(str(tiny_base)).parameters())
    half = sum(weight.numel() for weight in weights) / 2
    assert first["here"] == second["here"] == pytest.approx(half, rel=0.01)
    assert first["gathered"] == [list(weight.shape) for weight in weights]
    assert second["gathered"] == []
    assert first["left"] == second["left"] == 0
    assert first["apart"] == second["apart"] == len(weights)


# ---- weights that are elsewhere ------------------------------------------------------------------


def test_a_base_that_is_partly_on_the_disk_trains_as_a_whole_one(
    tiny_base: Path, tiny_files: Path, tmp_path: Path
) -> None:
    tokenizer, found = load_tokenizer(str(tiny_base)), []
    settings = TrainingSettings(
        steps=3, batch_size=4, learning_rate=1e-2, log_every=1, gradient_checkpointing=True
    )
    names = ("embed_tokens", "norm", "rotary_emb")
    on_disk = {"model.layers.0": "disk", "model.layers.1": "disk", "lm_head": "cpu"}
    on_disk |= {f"model.{name}": "cpu" for name in names}
    for name, places in (("whole", None), ("offloaded", on_disk)):
        base = AutoModelForCausalLM.from_pretrained(
            tiny_base, device_map=places, offload_folder=tmp_path / "weights"
        )
        model = attach(base, "pissa", rank=2)
        examples = load_examples(str(tiny_files / "train.jsonl"))
        train(model, tokenizer, examples, settings, tmp_path / name)
        lines = read_jsonl(tmp_path / name / "log.jsonl")
        found.append([line["loss"] for line in lines])
    assert any(weight.is_meta for weight in base.parameters())
    assert found[0] == found[1]
    assert found[0][-1] < found[0][0]
