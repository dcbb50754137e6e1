"""Denoising diffusion over action chunks.

The "DDPM" head of MaIL (arXiv:2406.08234; upstream ``agents/models/oc_ddpm/diffusion_policy.py``):
Ho et al. (arXiv:2006.11239) with the cosine schedule of Nichol and Dhariwal (arXiv:2102.09672).
"""

from collections.abc import Sequence

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from mail_agents.errors import InvalidInputError
from mail_agents.objectives import ActionNet, Draws, PlanNet, check_generators, masked_mse


class DDPM:
    """Noise prediction with T steps, sampled with all of them.

    Training: ``t ~ Uniform{0..T-1}`` per row, ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps``;
    the loss is the unweighted mean squared error between predicted and drawn noise.

    Sampling: from ``x_T ~ N(0, I)``, at each step the clean chunk is estimated as
    ``x0 = x_t / sqrt(abar_t) - sqrt(1 / abar_t - 1) eps`` and clamped, per action dimension, to the
    range of the training actions; then ``x_{t-1}`` is drawn from the posterior of Ho et al.,
    equations 6 and 7, without noise at the last step. The result is clamped again. The clamp is
    essential: at the first step ``1 / sqrt(abar)`` is 325.

    Deterministic sampling replaces every draw by its mean: ``x_T = 0`` and no posterior noise. That
    is a low-temperature sample: of a distribution with several modes it settles in one. (DDIM from
    a fixed draw is the usual deterministic sampler; over 16 steps it is less exact than either.)

    Args:
        steps: Number of diffusion steps T.
    """

    conditions_on_noise = True

    def __init__(self, steps: int = 16) -> None:
        if steps < 1:
            raise InvalidInputError(f"Diffusion needs at least 1 step; got {steps}.")
        self.steps = steps
        # Tables stay on the CPU wherever the network is: sampling reads single numbers from them.
        with torch.device("cpu"):
            betas = DDPMScheduler(steps, beta_schedule="squaredcos_cap_v2").betas.double()
            abar = torch.cumprod(1.0 - betas, dim=0)
            before = torch.cat((torch.ones(1), abar[:-1]))
        self.betas = betas
        self.alpha_bar = abar
        # diffusers' own step has no noise-free mode and clamps all action dimensions to one range,
        # so the posterior is written out: mean = from_start x0 + from_noisy x_t.
        self.from_start = (before.sqrt() * betas / (1.0 - abar)).tolist()
        self.from_noisy = ((1.0 - betas).sqrt() * (1.0 - before) / (1.0 - abar)).tolist()
        self.variance = (betas * (1.0 - before) / (1.0 - abar)).tolist()
        self._alpha_bars: list[float] = abar.tolist()

    def draw(
        self, target: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`~mail_agents.objectives.Objective`; steps, then noise."""
        where = target.device if generator is None else generator.device
        t = torch.randint(self.steps, target.shape[:1], generator=generator, device=where)
        noise = torch.randn(target.shape, generator=generator, device=where, dtype=target.dtype)
        return t.to(target.device), noise.to(target.device)

    def training_loss(
        self, net: ActionNet, target: Tensor, mask: Tensor | None = None, draws: Draws = None
    ) -> Tensor:
        """See :class:`~mail_agents.objectives.Objective`."""
        t, noise = self.draw(target) if draws is None else draws
        return masked_mse(net(self.add_noise(target, noise, t), t), noise, mask)

    def draw_noise(
        self,
        shape: tuple[int, int, int],
        generators: Sequence[torch.Generator],
        *,
        deterministic: bool,
        like: Tensor,
    ) -> Tensor:
        """See :class:`~mail_agents.objectives.Objective`.

        Returns:
            ``(T, B, J, A)`` in the order of use: the chunk to start from, then what is added after
            the steps T-1 .. 1, each with its deviation. All zeros are the deterministic sample.
        """
        check_generators(generators, shape[0])
        if deterministic or not generators:
            return like.new_zeros(self.steps, *shape)
        # Each chunk is drawn by itself: one draw for all of them gives other numbers.
        rows = [
            torch.stack([_normal(shape[1:], each, like.dtype) for _ in range(self.steps)])
            for each in generators
        ]
        noise = torch.stack(rows, dim=1)
        deviations = noise.new_tensor([1.0, *(v**0.5 for v in self.variance[:0:-1])])
        return (noise * deviations.view(-1, 1, 1, 1)).to(like.device)

    @torch.no_grad()
    def sample(self, net: PlanNet, noise: Tensor | None, *, low: Tensor, high: Tensor) -> Tensor:
        """See :class:`~mail_agents.objectives.Objective`."""
        if noise is None:
            raise InvalidInputError("Diffusion samples from the noise of draw_noise; got None.")
        x, *added = noise.unbind()
        for step in range(self.steps - 1, -1, -1):
            x0 = self.predict_start(x, net(x, step).to(x.dtype), step).clamp(low, high)
            x = self.from_start[step] * x0 + self.from_noisy[step] * x
            if step > 0:
                x = x + added[-step]
        return x.clamp(low, high)

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Diffuses clean chunks ``(B, J, A)`` to steps ``t`` ``(B,)``."""
        abar = self.alpha_bar.to(t.device, clean.dtype)[t].view(-1, 1, 1)
        return abar.sqrt() * clean + (1.0 - abar).sqrt() * noise

    def predict_start(self, noisy: Tensor, noise: Tensor, t: int) -> Tensor:
        """Estimates the clean chunk from a noisy one and the noise in it, unclamped."""
        abar = self._alpha_bars[t]
        return noisy / abar**0.5 - (1.0 / abar - 1.0) ** 0.5 * noise


def _normal(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
