"""What was measured once about a model on a kind of device: its fastest form, and the batch that fills the device.

`darkroom bench calibrate` writes `calibration.json` beside the weights. Start-up only reads it, so that the noise of a
measurement never changes pictures; where it has no entry, safe defaults apply.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self, cast

from worker.engine.tuning import Dtype, Tuning

FILE: Final = "calibration.json"
VERSION: Final = 1


class CalibrationError(ValueError):
    """A calibration file cannot be understood; the text says how to make it anew."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """`buckets` by lane label: the smallest batch that reaches about 80 % of the best throughput. `milliseconds` per
    step by lane label and batch, and `decode`, are for readers."""

    tuning: Tuning
    buckets: Mapping[str, int]
    milliseconds: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    decode_milliseconds: float = 0.0

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        tuning = Tuning.from_json(data["tuning"])
        buckets = {str(label): int(bucket) for label, bucket in data["buckets"].items()}
        if any(bucket < 1 for bucket in buckets.values()):
            raise ValueError(f"buckets {buckets}: expected numbers of at least 1")
        return cls(tuning, buckets, data.get("milliseconds", {}), float(data.get("decode_milliseconds", 0.0)))


@dataclasses.dataclass(frozen=True)
class DeviceCalibration:
    """`dtype` is what `auto` stands for; `psnr` in dB tells how near bf16 pictures come to those in fp32."""

    dtype: Dtype
    measured: Mapping[Dtype, Measured]
    threads: int = 0
    psnr: float | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        measured = {cast(Dtype, dtype): Measured.from_json(one) for dtype, one in data["measured"].items()}
        if data["dtype"] not in measured or any(one.tuning.dtype != dtype for dtype, one in measured.items()):
            raise ValueError(f"dtype {data['dtype']} and measured {', '.join(measured)}: expected matching entries")
        return cls(data["dtype"], measured, int(data.get("threads", 0)), data.get("psnr"))


@dataclasses.dataclass(frozen=True)
class Calibration:
    """All devices that a model was measured on, by `numerics.device_kind`."""

    devices: Mapping[str, DeviceCalibration] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Empty where there is none. Raises CalibrationError for a file that `write` did not write."""
        path = folder / FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["version"] != VERSION:
                raise ValueError(f"version {data['version']}, expected {VERSION}")
            return cls({kind: DeviceCalibration.from_json(one) for kind, one in data["devices"].items()})
        except FileNotFoundError:
            return cls()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            detail = f"{type(error).__name__}: {error}"
            raise CalibrationError(
                f"{path} cannot be read ({detail}); make it anew: darkroom bench calibrate --model-dir {folder.parent}"
            ) from error

    def write(self, folder: Path) -> None:
        data = {"version": VERSION, "devices": {kind: dataclasses.asdict(one) for kind, one in self.devices.items()}}
        (folder / FILE).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    def with_device(self, kind: str, entry: DeviceCalibration) -> Calibration:
        return Calibration({**self.devices, kind: entry})
