"""What a half-done picture needs to go on, in this process or another: its latents and how far they are.

Conditioning is made again from the request. The noise of later steps needs nothing but the number of steps done, since
every step of a request draws the same (`models.tasks.Start.step_noise`).
"""

from __future__ import annotations

import dataclasses
import json
import struct

import numpy as np
import torch
from torch import Tensor

_HEADER = struct.Struct("<I")
_MAX_HEADER = 4096


@dataclasses.dataclass(frozen=True)
class ResumeState:
    """`x` fp32 [z, h, w] after `step` steps; at the last step only the decoding is left. `clean`, of the same shape, is
    the x_0 that the last step predicted, for samplers that look back at it.

    `fingerprint` is that of the engine which made it: another one could not go on with the same bits.
    """

    fingerprint: str
    step: int
    x: Tensor
    clean: Tensor | None = None

    def to_bytes(self) -> bytes:
        """Length of the header, header in JSON, then x and, where there is one, `clean` as little-endian fp32."""
        tensors = [self.x] if self.clean is None else [self.x, self.clean]
        header = {"fingerprint": self.fingerprint, "step": self.step, "shape": [len(tensors), *self.x.shape]}
        text = json.dumps(header).encode()
        return _HEADER.pack(len(text)) + text + torch.stack(tensors).cpu().numpy().astype("<f4", copy=False).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> ResumeState:
        """Raises ValueError for anything that `to_bytes` did not write."""
        try:
            (length,) = _HEADER.unpack_from(data)
            header = json.loads(data[_HEADER.size : _HEADER.size + min(length, _MAX_HEADER)])
            fingerprint, step, shape = str(header["fingerprint"]), int(header["step"]), tuple(header["shape"])
            values = np.frombuffer(data, "<f4", offset=_HEADER.size + length).astype(np.float32)
            tensors = torch.from_numpy(values).reshape(shape)
        except (struct.error, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"no resume state: {error}") from error
        if step < 0 or tensors.dim() != 4 or tensors.shape[0] not in (1, 2):
            raise ValueError(f"no resume state: step {step}, shape {shape}; expected 0 or more, and 1 or 2 of z, h, w")
        return cls(fingerprint, step, tensors[0], tensors[1] if tensors.shape[0] == 2 else None)
