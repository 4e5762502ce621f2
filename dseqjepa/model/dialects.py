"""The parts of a ViT by the names of other libraries: to ours, which are timm's, and back.

What another library computes with more parameters, and ours with fewer, becomes ours exactly: the
factors of LayerScale go into the matrices before them, and a bias that is not there is zero.

Suffixes: D width, O outputs, I inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

HF_OUTER = {
    "pos_embed": "embeddings.position_embeddings",
    "cls_token": "embeddings.cls_token",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
"""A part outside the blocks -> what transformers calls it on disk."""
HF_LAYER = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
"""A block's part -> its name on disk there; queries, keys and values are apart."""
HF_THIRDS = ("query", "key", "value")
HF_QKV = re.compile(rf"attention\.attention\.({'|'.join(HF_THIRDS)})\.(weight|bias)")
HF_BLOCK = re.compile(r"encoder\.layer\.(\d+)\.(.+)")
HF_SCALE = re.compile(r"layer_scale([12])\.lambda1")
SCALED = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}
"""A factor of LayerScale -> the linear layer whose output it multiplies."""
UNFIT = {
    "register tokens": r"(embeddings\.)?(register_tokens|reg_token)",
    "gated MLPs (SwiGLU)": r".*\.mlp\.(w\d+|fc1_g|fc1_x|weights_in|weights_out|gate_proj)\..*",
    "a distillation token": r"(embeddings\.)?(dist_token|distillation_token)",
    "a norm before its blocks": r"norm_pre\..*|pre_layrnorm\..*",
    "norms of queries and keys": r".*\.(q_norm|k_norm|norm_q|norm_k)\..*",
    "rotary positions": r".*(rope|periods|freqs).*|layer\.\d+\.attention\.q_proj\..*",
    "relative positions": r".*relative_position.*|.*rel_pos.*",
}
"""What an encoder may have and ours has not -> the keys that tell."""


def by_our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers by timm's names; that of anything else as it is."""
    if HF_OUTER["patch_embed.proj.weight"] not in state:
        return dict(state)
    outer = {theirs: ours for ours, theirs in HF_OUTER.items()}
    inner = {theirs: ours for ours, theirs in HF_LAYER.items()}
    named: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        block = HF_BLOCK.fullmatch(key)
        if block is None:
            named[outer.get(key, key)] = value
            continue
        number, rest = block.groups()
        part, _, kind = rest.rpartition(".")
        if third := HF_QKV.fullmatch(rest):
            thirds.setdefault(f"blocks.{number}.attn.qkv.{third[2]}", {})[third[1]] = value
        elif scale := HF_SCALE.fullmatch(rest):
            named[f"blocks.{number}.ls{scale[1]}.gamma"] = value
        else:
            named[f"blocks.{number}.{inner.get(part, part)}.{kind}"] = value
    for key, parts in thirds.items():
        if parts.keys() == set(HF_THIRDS) and len({part.shape[1:] for part in parts.values()}) == 1:
            named[key] = torch.cat([parts[third] for third in HF_THIRDS])
        else:
            named |= {f"{key} ({third})": part for third, part in parts.items()}
    return named


def misfits(state: Mapping[str, Tensor]) -> dict[str, str]:
    """What a state dict has and our encoder has not, each with a key that shows it."""
    found = {}
    for what, pattern in UNFIT.items():
        key = next((key for key in state if re.fullmatch(pattern, key)), None)
        if key is not None:
            found[what] = key
    first, second = (state.get(f"blocks.0.mlp.fc{number}.weight") for number in (1, 2))
    if first is not None and second is not None and first.shape[0] == 2 * second.shape[-1]:
        found["gated MLPs (SwiGLU)"] = "blocks.0.mlp.fc1.weight"
    return found


def folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict by timm's names as one without LayerScale, and with a bias of queries, keys and
    values: the same function."""
    plain = {key: value for key, value in state.items() if not key.endswith((*SCALED,))}
    for key, gamma_D in state.items():
        block, _, rest = key.partition(".ls")
        scaled = SCALED.get(f"ls{rest}")
        if scaled is None or f"{block}.{scaled}.weight" not in plain:
            continue
        weight, bias = f"{block}.{scaled}.weight", f"{block}.{scaled}.bias"
        plain[weight] = plain[weight] * gamma_D[:, None]
        if bias in plain:
            plain[bias] = plain[bias] * gamma_D
    for key, weight_OI in state.items():
        bias = key.removesuffix("weight") + "bias"
        if key.endswith(".attn.qkv.weight") and bias not in plain:
            plain[bias] = weight_OI.new_zeros(len(weight_OI))
    return plain


def farthest(ours: Tensor, theirs: Tensor) -> float:
    """How far features lie apart at most, in units of the root mean square of `ours` where that is
    more than 1; infinite where they are of another shape."""
    if ours.shape != theirs.shape:
        return float("inf")
    unit = max(1.0, float(ours.square().mean().sqrt()))
    return float((ours - theirs).abs().max()) / unit
