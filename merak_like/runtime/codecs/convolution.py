"""``c3sl``: several samples superposed in one, by circular convolution with a key each.

Of every R samples, flattened to D features, one vector travels: V = sum_i K_i (*) Z_i. The receiver takes Z'_i = K_i
(x) V, the circular correlation, which is the convolution's transpose; so a gradient goes back by the same two steps,
also R times smaller, and what the sender gets is exact for what the receiver computed from (Hsieh et al. 2022,
"C3-SL: Circular Convolution-Based Batch-Wise Compression for Communication-Efficient Split Learning" (MLSP), sec. 3;
holographic reduced representations, Plate 1995). Keys are N(0, 1/D), of unit norm, fixed, made from ``seed``: nothing
is trained and they never travel. By FFT it costs O(D log D).

It is lossy, and by much: the R - 1 other samples stay in each as noise. The squared error is about R times the
signal's energy, (R - 1) times with ``unitary`` keys (all frequencies of magnitude 1), whatever D is. It works because
a network trained through it learns to live with that. A last group of one sample is sent as it is. NaN and infinities
fill their group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from merak_like.runtime.codecs.codec import Codec, Context, by_sample, require_floating
from merak_like.runtime.codecs.plain import narrow
from merak_like.runtime.codecs.uniform import work_dtype
from merak_like.runtime.codecs.wire import Layout, layout_of


@dataclass(eq=False)
class C3SL(Codec):
    """``group`` samples in one."""

    name: ClassVar[str] = "c3sl"
    group: int = 4
    unitary: bool = False
    seed: int = 0
    _last: tuple[tuple[int, int], Tensor] | None = field(init=False, default=None, repr=False)
    """The keys last used, as (count, features), and their frequencies."""

    def __post_init__(self) -> None:
        if self.group < 1:
            raise ValueError(f"{self.text}: a group is 1 sample or more, found {self.group}")

    def pack(self, x: Tensor, context: Context) -> tuple[Tensor, bytes]:
        layout = self.packed(layout_of(x), context)[0]
        samples, features = by_sample(tuple(x.shape))
        rows, bound = x.reshape(samples, features), self._bound(samples)
        if not bound or not features:
            return rows.new_empty(layout.shape) if bound else rows, b""
        z = rows[:bound].to(work_dtype(x.dtype))
        group = min(self.group, bound)
        z = torch.cat([z, z.new_zeros(-bound % group, features)]).view(-1, group, features)
        v = torch.fft.irfft((torch.fft.rfft(z) * self._frequencies(group, z)).sum(1), n=features)
        return torch.cat([narrow(v, x.dtype), rows[bound:]]), b""

    def unpack(self, body: Tensor, side: bytes, layout: Layout, context: Context) -> Tensor:
        self.expect(body, side, layout, context)
        samples, features = by_sample(layout.shape)
        bound = self._bound(samples)
        if not bound or not features:
            return body.new_empty(layout.shape) if bound else body.view(layout.shape)
        v = body[: -(-bound // self.group)].to(work_dtype(layout.dtype)).unsqueeze(1)
        keys = self._frequencies(min(self.group, bound), v)
        z = torch.fft.irfft(torch.fft.rfft(v) * keys.conj(), n=features)
        rows = narrow(z, layout.dtype).view(-1, features)[:bound]
        return torch.cat([rows, body[v.shape[0] :]]).view(layout.shape)

    def packed(self, layout: Layout, context: Context) -> tuple[Layout, int]:
        require_floating(layout, self.text)
        samples, features = by_sample(layout.shape)
        return Layout((-(-samples // self.group), features), layout.dtype), 0

    def keys(self, count: int, features: int) -> Tensor:
        """The first ``count`` keys, (count, features), in fp64: the same on every machine."""
        # Box-Muller on raw words of Philox, whose stream is fixed (Salmon et al. 2011): no library's idea of `randn`.
        words = np.random.Philox(self.seed).random_raw(2 * count * features)
        uniform = torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)
        u, v = uniform.view(count, 2, features).unbind(1)
        keys = torch.sqrt(-2 * torch.log1p(-u)) * torch.cos(2 * torch.pi * v)
        if self.unitary:
            spectrum = torch.fft.rfft(keys)
            return torch.fft.irfft(spectrum / spectrum.abs(), n=features)
        return keys / keys.norm(dim=1, keepdim=True)

    def _bound(self, samples: int) -> int:
        """How many samples are bound in groups of two or more: all, or all but a last one on its own."""
        return samples - (samples % self.group == 1) if self.group > 1 else 0

    def _frequencies(self, count: int, like: Tensor) -> Tensor:
        made = count, like.shape[-1]
        if self._last is None or self._last[0] != made:
            self._last = made, torch.fft.rfft(self.keys(*made))
        kind = torch.complex128 if like.dtype == torch.float64 else torch.complex64
        return self._last[1].to(like.device, kind)
