import subprocess
import sys

import pytest

from mail_agents.registry import list_agents, spec

VARIANTS = [f"{v}-{o}" for v in ("d-ma", "ed-ma", "d-tr", "ed-tr") for o in ("bc", "ddpm")]


def test_the_eight_variants_and_their_released_twins_exist():
    expected = {f"mail/{v}{s}" for v in VARIANTS for s in ("", "-released")} | {
        "mail/ed-ma-ddpm-so"
    }
    assert set(list_agents("mail/*")) == expected
    assert set(list_agents(tags=["mail", "released"])) == {f"mail/{v}-released" for v in VARIANTS}
    assert set(list_agents(tags=["mail", "transformer", "bc"])) == {
        f"mail/{v}-bc{s}" for v in ("d-tr", "ed-tr") for s in ("", "-released")
    }


def shape(agent_id):
    config = spec(agent_id).config()
    return [
        (
            s.mixer,
            s.layers,
            *((s.d_state, s.d_conv) if s.mixer == "mamba" else (s.heads, s.dropout)),
        )
        for s in (config.encoder, config.decoder)
        if s.layers
    ]


@pytest.mark.parametrize("tail", ["bc", "ddpm", "bc-released", "ddpm-released"])
def test_presets_have_the_published_sizes(tail):
    assert shape(f"mail/d-ma-{tail}") == [("mamba", 16, 16, 4)]
    assert shape(f"mail/ed-ma-{tail}") == [("mamba", 8, 8, 2), ("mamba", 10, 8, 2)]
    assert shape(f"mail/d-tr-{tail}") == [("attention", 8, 4, 0.1)]
    assert shape(f"mail/ed-tr-{tail}") == [("attention", 4, 4, 0.1), ("attention", 6, 4, 0.1)]
    assert shape("mail/ed-ma-ddpm-so") == [("mamba", 10, 16, 4), ("mamba", 6, 16, 2)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_recipe(variant):
    config = spec(f"mail/{variant}").config()
    released = spec(f"mail/{variant}-released").config()
    diffusion = variant.endswith("ddpm")
    assert config.objective == ("ddpm" if diffusion else "bc")
    assert config.ema_decay == (0.995 if diffusion else None)
    assert (config.diffusion_steps, config.width, config.action_norm) == (16, 128, "mean_std")
    optim = config.optim
    assert (optim.name, optim.lr, optim.weight_decay, optim.batch_size) == ("adam", 5e-4, 0.0, 256)
    assert (optim.schedule, optim.warmup_steps, optim.grad_clip) == ("constant", 0, None)
    assert (config.init, config.padding) == ("mamba", "edge")
    assert (released.init, released.padding) == ("upstream", "none")
    assert released.replace({"init": "mamba", "padding": "edge"}) == config


def test_listing_and_configuring_import_no_torch():
    code = (
        "import sys, mail_agents; mail_agents.list_agents('mail/*');"
        "mail_agents.spec('mail/ed-ma-ddpm').config(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
