"""A config.json is read a second time, by other code: what the families read otherwise than transformers is refused."""

from __future__ import annotations

import dataclasses

import pytest

from apr.common.errors import AprError
from apr.model import hf_config
from apr.model.families import FAMILIES, family, olmo2, smollm3
from apr.model.hf_config import from_hf, to_hf
from apr.model.presets import PRESETS
from apr.model.rope_scaling import YarnScaling

TINY = {name.removesuffix("-tiny"): c for name, c in PRESETS.items() if name.endswith("-tiny")}
WINDOW = {"use_sliding_window": True, "sliding_window": 8}


def config(kind, without=(), **more):
    return {k: x for k, x in to_hf(TINY[kind]).items() if k not in without} | more


def a_window_begins_a_layer_late(m):
    def late(keys, layers):
        first = keys.number("max_window_layers", zero=True)
        full, sliding = family.FULL, family.SLIDING
        return family.window_by_layer(
            keys, layers, lambda: [full if i <= first else sliding for i in range(layers)]
        )

    m.setitem(FAMILIES, "qwen2", dataclasses.replace(FAMILIES["qwen2"], read=late))
    return config("qwen2", ("layer_types",), max_window_layers=0, **WINDOW)


def layers_are_counted_from_0(m):
    right = smollm3.read

    def read(keys, layers):
        return right(keys, layers) | {"no_rope_layers": tuple(range(0, layers, 2))}

    m.setitem(FAMILIES, "smollm3", dataclasses.replace(FAMILIES["smollm3"], read=read))
    return config("smollm3", ("no_rope_layers", "layer_types"), no_rope_layer_interval=2)


def a_default_of_another_class(m):
    m.setitem(FAMILIES, "olmo2", dataclasses.replace(FAMILIES["olmo2"], defaults=olmo2.DEFAULTS))
    return config("olmo2", ("rms_norm_eps",))


def a_theta_inside_is_not_read(m):
    right = hf_config._rope

    def rope(keys):
        return 10000.0, right(keys)[1]

    m.setattr(hf_config, "_rope", rope)
    return config("llama", ("rope_theta",), rope_parameters={"rope_theta": 7e4, "rope_type": "default"})


FAULTS = [
    a_window_begins_a_layer_late, layers_are_counted_from_0, a_default_of_another_class, a_theta_inside_is_not_read,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_configuration_that_was_read_otherwise_is_refused(monkeypatch, fault):
    with monkeypatch.context() as m:
        given = fault(m)
        with pytest.raises(AprError, match=r"was read as .* a second time, as"):
            from_hf(given)
    from_hf(given)


@pytest.mark.parametrize("kind", TINY)
def test_both_readings_are_one_of_files_that_leave_out_what_they_may(kind):
    for without in ((), ("rms_norm_eps",), ("rope_theta",), ("tie_word_embeddings",), ("head_dim",)):
        if without != ("head_dim",) or kind != "qwen3":
            from_hf(config("llama" if kind == "llama3" else kind, without))


def test_both_readings_are_one_of_unusual_files():
    yarn = dataclasses.asdict(YarnScaling(4.0, 32, mscale=0.7, mscale_all_dim=1.0, truncate=False))
    yarn = {k: x for k, x in yarn.items() if x is not None}
    for given in (
        config("qwen2", ("layer_types",), max_window_layers=1, **WINDOW),
        config("qwen2", ("layer_types",), **WINDOW, max_window_layers=99),
        config("qwen3", layer_types=["full_attention"] * TINY["qwen3"].num_layers, **WINDOW),
        config("mistral", ("sliding_window",)),
        config("mistral", sliding_window=None),
        config("smollm3", ("no_rope_layers", "layer_types"), **WINDOW),
        config("olmo2", ("num_key_value_heads",)),
        config("llama", num_key_value_heads=None),
        config("llama", rope_scaling={"rope_type": "yarn", **yarn}),
        config("llama", rope_scaling={"type": "linear", "factor": 2}),
    ):
        from_hf(given)
