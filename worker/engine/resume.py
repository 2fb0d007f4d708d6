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
    """`x` fp32 [z, h, w] after `step` steps; at the last step only the decoding is left.

    `fingerprint` is that of the engine which made it: another one could not go on with the same bits.
    """

    fingerprint: str
    step: int
    x: Tensor

    def to_bytes(self) -> bytes:
        """Length of the header, header in JSON, then x as little-endian fp32."""
        header = {"fingerprint": self.fingerprint, "step": self.step, "shape": list(self.x.shape)}
        text = json.dumps(header).encode()
        return _HEADER.pack(len(text)) + text + self.x.cpu().numpy().astype("<f4", copy=False).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> ResumeState:
        """Raises ValueError for anything that `to_bytes` did not write."""
        try:
            (length,) = _HEADER.unpack_from(data)
            header = json.loads(data[_HEADER.size : _HEADER.size + min(length, _MAX_HEADER)])
            fingerprint, step, shape = str(header["fingerprint"]), int(header["step"]), tuple(header["shape"])
            values = np.frombuffer(data, "<f4", offset=_HEADER.size + length).astype(np.float32)
            x = torch.from_numpy(values).reshape(shape)
        except (struct.error, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"no resume state: {error}") from error
        if step < 0 or x.dim() != 3:
            raise ValueError(f"no resume state: step {step}, shape {shape}; expected 0 or more, and three sizes")
        return cls(fingerprint, step, x)
