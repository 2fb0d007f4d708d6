"""Names of the tensors in a file of low-rank adapters, in the three formats in which they are published.

M is a module's name, "down" and "up" are A and B of W + scale B A (Hu et al. 2021, equation 3):

    diffusers, peft     unet.M.lora_A.weight and lora_B; base_model.model. before M where peft itself wrote the file
    diffusers 0.1, 0.2  unet.….attn1.processor.to_q_lora.down.weight, unet.M.lora.down.weight,
                        text_encoder.text_model.….q_proj.lora_linear_layer.down.weight, or to_q_lora there as well
    kohya               lora_unet_<M with _ for .>.lora_down.weight and lora_up, .alpha; lora_te_… for the text encoder,
                        lora_te1_… and lora_te2_… for SDXL's two, whose UNet's M are those of the original layout
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

Part = Literal["unet", "text_encoder", "text_encoder_2"]
Role = Literal["down", "up", "alpha"]

_ROLES: dict[str, Role] = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
_KOHYA: dict[Part, tuple[str, ...]] = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
_PEFT = "base_model.model."
WRAPPER = "text_model."
"""Before every name of a text encoder in most files, but in few of transformers' classes any more."""
_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class Place(NamedTuple):
    """The module that a tensor belongs to, and what it is of the adapter of that module."""

    part: Part
    module: str
    role: Role


class Names:
    """Reads keys for a model whose parts have modules of these names, without WRAPPER."""

    def __init__(self, modules: Mapping[Part, Iterable[str]], original: Mapping[str, str]) -> None:
        """`original`: names of the UNet's modules by what the original layout calls them."""
        # Underscores within names make the way back ambiguous, so every name is made and looked up.
        self._underscored: dict[str, tuple[Part, str]] = {}
        for part, names in modules.items():
            for name in names:
                for spelling in (name, WRAPPER + name):
                    self._add(part, spelling, name)
        for spelling, name in original.items():
            self._add("unet", spelling, name)

    def _add(self, part: Part, spelling: str, name: str) -> None:
        for prefix in _KOHYA[part]:
            self._underscored[prefix + spelling.replace(".", "_")] = (part, name)

    def place(self, key: str) -> Place | None:
        """None for a key of no known format, or of a kohya module that the model does not have."""
        suffix = next((suffix for suffix in _ROLES if key.endswith(suffix)), None)
        if suffix is None:
            return None
        stem = key.removesuffix(suffix)
        is_kohya = "." not in stem and stem.startswith("lora_")
        module = self._underscored.get(stem) if is_kohya else _dotted(stem)
        return None if module is None else Place(*module, _ROLES[suffix])


def _dotted(stem: str) -> tuple[Part, str]:
    """A file without prefixes is of the UNet: diffusers 0.1x saved its attention processors so."""
    stem = stem.removeprefix(_PEFT)
    part: Part = "unet"
    for prefix in _KOHYA:
        if stem.startswith(prefix + "."):
            stem, part = stem.removeprefix(prefix + "."), prefix
            break
    stem = stem.removeprefix(_PEFT)
    if stem.startswith(WRAPPER):
        stem, part = stem.removeprefix(WRAPPER), "text_encoder" if part == "unet" else part
    parent, _, leaf = stem.replace(".processor.", ".").rpartition(".")
    if part != "unet":
        leaf = _TEXT_NAMES.get(leaf, leaf)
    elif leaf == "to_out":
        leaf = "to_out.0"
    return part, f"{parent}.{leaf}" if parent else leaf
