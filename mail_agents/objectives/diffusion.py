"""Denoising diffusion over action chunks.

The "DDPM" head of MaIL (arXiv:2406.08234; upstream ``agents/models/oc_ddpm/diffusion_policy.py``):
Ho et al. (arXiv:2006.11239) with the cosine schedule of Nichol and Dhariwal (arXiv:2102.09672).
Schedules and sampler steps are those of ``diffusers``.
"""

from collections.abc import Sequence

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mail_agents.errors import InvalidInputError
from mail_agents.objectives import ActionNet, check_generators, masked_mse

#: Seed of the initial noise of deterministic sampling.
DETERMINISTIC_SEED = 0


class DDPM:
    """Noise prediction with T steps, sampled with all of them.

    Training: ``t ~ Uniform{0..T-1}`` per row, ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps``;
    the loss is the unweighted mean squared error between predicted and drawn noise.

    Sampling: from ``x_T ~ N(0, I)``, at each step the clean chunk is estimated as
    ``x0 = x_t / sqrt(abar_t) - sqrt(1 / abar_t - 1) eps`` and clamped, per action dimension, to the
    range of the training actions. The clamp is essential: at the last step ``1 / sqrt(abar)`` is
    325. Then

    - stochastic: ancestral sampling, the posterior of DDPM with its own ("fixed small") variance,
      no noise at the end: the published evaluation;
    - deterministic: DDIM with eta = 0 (Song et al., arXiv:2010.02502) over the same T steps, from
      one fixed draw of ``x_T``. Unlike the posterior mean alone, which drops the noise that the
      schedule counts on, this maps noise to a full sample of the learnt distribution.

    The result is clamped again.

    Args:
        steps: Number of diffusion steps T.
    """

    conditions_on_noise = True

    def __init__(self, steps: int = 16) -> None:
        if steps < 1:
            raise InvalidInputError(f"Diffusion needs at least 1 step; got {steps}.")
        self.steps = steps
        # The schedulers are given x0, not eps: their own conversion clamps to one range for all
        # action dimensions, ours to one range per dimension.
        self.ancestral = DDPMScheduler(
            num_train_timesteps=steps,
            beta_schedule="squaredcos_cap_v2",
            variance_type="fixed_small",
            prediction_type="sample",
            clip_sample=False,
        )
        self.implicit = DDIMScheduler.from_config(self.ancestral.config)
        self.implicit.set_timesteps(steps)
        # Kept on the CPU: the schedulers' own add_noise moves their tables to the device of the
        # last training batch, where a later step on another device could not read them.
        self.alpha_bar = self.ancestral.alphas_cumprod.clone()
        self._alpha_bars: list[float] = self.alpha_bar.tolist()

    def training_loss(
        self,
        net: ActionNet,
        target: Tensor,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See :class:`~mail_agents.objectives.Objective`."""
        where = target.device if generator is None else generator.device
        t = torch.randint(self.steps, target.shape[:1], generator=generator, device=where)
        noise = torch.randn(target.shape, generator=generator, device=where, dtype=target.dtype)
        t, noise = t.to(target.device), noise.to(target.device)
        return masked_mse(net(self.add_noise(target, noise, t), t), noise, mask)

    @torch.no_grad()
    def sample(
        self,
        net: ActionNet,
        shape: tuple[int, int, int],
        generators: Sequence[torch.Generator],
        *,
        deterministic: bool,
        low: Tensor,
        high: Tensor,
    ) -> Tensor:
        """See :class:`~mail_agents.objectives.Objective`."""
        rows = list(generators)
        check_generators(rows, shape[0])
        if deterministic:
            x = self._fixed_noise(shape).to(low)
        else:
            x = randn_tensor(shape, generator=rows, device=low.device, dtype=low.dtype)
        for step in range(self.steps - 1, -1, -1):
            t = torch.full(shape[:1], step, dtype=torch.int64, device=low.device)
            x0 = self.predict_start(x, net(x, t).to(x.dtype), step).clamp(low, high)
            if deterministic:
                x = self.implicit.step(x0, step, x, eta=0.0, return_dict=False)[0]
            else:
                x = self.ancestral.step(x0, step, x, generator=rows, return_dict=False)[0]
        return x.clamp(low, high)

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Diffuses clean chunks ``(B, J, A)`` to steps ``t`` ``(B,)``."""
        abar = self.alpha_bar.to(t.device)[t].view(-1, 1, 1).to(clean.dtype)
        return abar.sqrt() * clean + (1.0 - abar).sqrt() * noise

    def predict_start(self, noisy: Tensor, noise: Tensor, t: int) -> Tensor:
        """Estimates the clean chunk from a noisy one and the noise in it, unclamped."""
        abar = self._alpha_bars[t]
        return noisy / abar**0.5 - (1.0 / abar - 1.0) ** 0.5 * noise

    def _fixed_noise(self, shape: tuple[int, int, int]) -> Tensor:
        # Every row starts from the same noise: what a row does must not depend on its place.
        generator = torch.Generator().manual_seed(DETERMINISTIC_SEED)
        return torch.randn((1, *shape[1:]), generator=generator).expand(shape)
