"""What a picture's bits depend on beside its request: settings that are pinned, a name for all of them, and a proof at
start that the company a row keeps does not count among them.

See docs/decisions/0005-exact-batching.md for what was measured.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from worker.engine import runner
from worker.engine.bank import Bank
from worker.engine.cores import usable_cores
from worker.engine.resident import ResidentModel
from worker.engine.scheduler import LaneKey

_CUBLAS_WORKSPACE = ":4096:8"
_ENVIRONMENT = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_CBWR", "OMP_DYNAMIC")
_SEED = 20220413
_SMALL = 32  # sides of latents up to which all rows count alike

_log = logging.getLogger(__name__)


class NumericsError(ValueError):
    """Pictures would depend on their company; the text says where that showed and what to do."""


def pin(threads: int | None = None) -> int:
    """Fixes threads and backend flags of the whole process, before any model is made; returns the number of threads.

    A power of two of threads: with three, some kernels split a batch differently from row to row. Raises NumericsError
    where OpenMP was told to choose the number of threads itself.
    """
    if os.environ.get("OMP_DYNAMIC", "").strip().lower() in ("true", "1"):
        raise NumericsError("OMP_DYNAMIC is set: the number of threads would change from call to call; unset it")
    available = min(torch.get_num_threads(), usable_cores())
    count = 1 << ((threads or available).bit_length() - 1)
    torch.set_num_threads(count)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_WORKSPACE)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if torch.cuda.is_available():  # one kernel for attention; on CPUs there is but one
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.enable_math_sdp(True)
    return count


def device_kind(device: torch.device) -> str:
    """Devices of one kind run the same kernels at about the same speed: the GPU's name, or the CPU's instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability != "avx512":
        return f"cpu-{capability}"
    for name, check in (("amx", "_is_amx_tile_supported"), ("avx512_bf16", "_is_avx512_bf16_supported")):
        if hasattr(torch.cpu, check) and getattr(torch.cpu, check)():
            return f"cpu-{name}"
    return "cpu-avx512"


def has_fast_bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" or device_kind(device) in ("cpu-amx", "cpu-avx512_bf16")


def fingerprint(device: torch.device, models: Mapping[str, object], **more: object) -> str:
    """16 hex digits. `models`: by name, what JSON can hold of weights' digest, tuning, buckets."""
    facts = {
        "torch": torch.__version__,
        "mkl, onednn": torch.__config__.show(),
        "numpy": np.__version__,
        "device": device_kind(device),
        "machine": _machine(device),
        "threads": torch.get_num_threads(),
        "deterministic": torch.backends.cudnn.deterministic,
        "environment": {name: os.environ.get(name) for name in (*_ENVIRONMENT, "CUBLAS_WORKSPACE_CONFIG")},
        "models": models,
        **more,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _machine(device: torch.device) -> str:
    """What else chooses kernels: the CPU's maker and family, by which MKL and oneDNN decide."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            parts = [line.partition(":") for line in lines]
    except OSError:
        return platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in parts}
    return " ".join(fields.get(name, "") for name in ("vendor_id", "cpu family", "model", "flags"))


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters, for models whose card has none."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def powers_of_two(most: int) -> tuple[int, ...]:
    """1, 2, 4 ... up to `most`."""
    return tuple(2**power for power in range(most.bit_length()))


@torch.inference_mode()
def probe(resident: ResidentModel, key: LaneKey, buckets: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Groups of `buckets` in which a row has equal bits, ascending. One row takes a step in every slot of every bucket,
    among random neighbours that change.

    Raises NumericsError where the row's bits differ within a bucket.
    """
    bank = Bank(resident, key, max(buckets))
    random = torch.Generator().manual_seed(_SEED)
    sample = _Sample(bank, resident, random)
    results: dict[int, Tensor] = {}
    for bucket in sorted(buckets):
        for first in (0, 1):
            slots = list(range(first % bucket, bucket, 2))
            sample.scatter(bank, slots)
            runner.step(resident, bank, slice(0, bucket))
            results.setdefault(bucket, bank.x[slots[0]].clone())
            differing = [slot for slot in slots if not torch.equal(bank.x[slot], results[bucket])]
            if differing:
                far = max((bank.x[slot] - results[bucket]).abs().max().item() for slot in differing)
                raise NumericsError(
                    f"{key.model}, {key.label}: in a batch of {bucket} the same row comes out differently in slots "
                    f"{differing} (by up to {far:.1e}), so a picture would depend on its company; "
                    "use batching=fast, or another number of threads"
                )
    groups: list[list[int]] = []
    for bucket, result in results.items():
        equal = next((group for group in groups if torch.equal(results[group[0]], result)), None)
        if equal is None:
            groups.append([bucket])
        else:
            equal.append(bucket)
    return tuple(tuple(group) for group in groups)


def scatter_at_random(resident: ResidentModel, bank: Bank, seed: int = _SEED) -> None:
    """Fills all slots with random rows at random timesteps, for measurements."""
    _Sample(bank, resident, torch.Generator().manual_seed(seed)).scatter(bank, ())


class _Sample:
    """One row's tensors, drawn at random; around it rows that are drawn anew at every `scatter`."""

    def __init__(self, bank: Bank, resident: ResidentModel, random: torch.Generator) -> None:
        self._random = random
        self._last = resident.time_table.shape[0] - 1
        self._tensors = [(tensor, dim, self._draw(tensor.select(dim, 0).shape)) for tensor, dim in self._banks(bank)]
        self._factors = [
            (tensor, (tensor[0, 0].numel() ** -0.5 * self._draw(tensor.shape[1:])).to(tensor))
            for tensor in self._adapters(bank)
        ]

    @staticmethod
    def _adapters(bank: Bank) -> list[Tensor]:
        """Factors of every module that adapters can change."""
        if bank.adapters is None:
            return []
        bank.adapters.cover_all()
        return [tensor for factors in bank.adapters.factors.values() for tensor in factors]

    @staticmethod
    def _banks(bank: Bank) -> list[tuple[Tensor, int]]:
        """What else differs between rows, with the dimension of the slots."""
        tensors = [bank.x, bank.noise, bank.clean, bank.conditioning, bank.guidance]
        rows = [(tensor, 0) for tensor in (*tensors, *(bank.blend or ())) if tensor is not None]
        return rows + [(tensor, 1) for tensor in bank.per_condition]

    def _draw(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self._random)

    def scatter(self, bank: Bank, slots: Sequence[int]) -> None:
        for tensor, dim, row in self._tensors:
            tensor.copy_(self._draw(tensor.shape))
            for slot in slots:
                tensor.select(dim, slot).copy_(row)
        for tensor, row in self._factors:  # too many to draw them all anew
            for slot, factor in enumerate(self._draw(tensor.shape[:1]).tolist()):
                torch.mul(row, 1.0 if slot in slots else factor, out=tensor[slot])
        bank.timesteps.copy_(torch.randint(0, self._last, bank.timesteps.shape, generator=self._random))
        bank.coefficients.copy_(self._draw(bank.coefficients.shape))
        bank.step.zero_()
        for slot in slots:
            bank.timesteps[slot] = self._last // 2
            bank.coefficients[slot] = torch.tensor([0.9, -0.1, 0.1, 0.05, 0.8, -0.2])


class ExactPlan:
    """The buckets of every lane where bits count: the group of equal ones that holds the lane's usual bucket, which a
    single picture leaves for the smallest of them.

    A lane is probed when it is first asked for; the answer never changes afterwards. Where a lane fails the probe, its
    rows run alone, which is always exact.
    """

    def __init__(
        self, residents: Mapping[str, ResidentModel], slots: int, calibrated: Callable[[LaneKey], int | None]
    ) -> None:
        """`calibrated` tells the bucket that a lane was measured to need."""
        self._residents = residents
        self._slots = slots
        self._calibrated = calibrated
        self._plans: dict[LaneKey, tuple[int, ...]] = {}

    def __call__(self, key: LaneKey) -> tuple[int, ...]:
        if key not in self._plans:
            try:
                self._plans[key] = self.prove(key)
            except NumericsError as error:
                _log.warning("%s; its pictures are denoised one by one", error)
                self._plans[key] = (1,)
        return self._plans[key]

    def prove(self, key: LaneKey) -> tuple[int, ...]:
        """As calling it, but raises NumericsError where the lane fails the probe."""
        if key not in self._plans:
            usual = self.usual_bucket(key)
            groups = probe(self._residents[key.model], key, powers_of_two(max(usual, self._by_area(key))))
            self._plans[key] = next(group for group in groups if usual in group)
        return self._plans[key]

    def usual_bucket(self, key: LaneKey) -> int:
        """As calibrated, else by area. A power of two."""
        return powers_of_two(min(self._calibrated(key) or self._by_area(key), self._slots))[-1]

    def _by_area(self, key: LaneKey) -> int:
        """As many rows as have the pixels of a full batch of usual ones."""
        native = max(*self._residents[key.model].model.unet.config.size, _SMALL) ** 2
        return max(1, self._slots * native // max(key.height * key.width, native))
