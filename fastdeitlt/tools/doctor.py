"""`doctor`: check the installation and the machine, with remedies.

Heavy packages are probed in separate processes, so that a broken one affects only its own row.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastdeitlt.errors import counted
from fastdeitlt.machine import available_memory, usable_cores

GIB = 2**30
PROBE_TIMEOUT_S = 120
STYLES = {"ok": "green", "warn": "yellow", "missing": "dim", "broken": "bold red"}


@dataclass(frozen=True)
class Row:
    """One finding; ``broken`` (a required part does not work) makes the doctor fail."""

    name: str
    status: Literal["ok", "warn", "missing", "broken"]
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Report:
    """The findings, in a fixed order."""

    rows: list[Row]

    @property
    def exit_code(self) -> int:
        """1 if something required is broken, else 0."""
        return int(any(row.status == "broken" for row in self.rows))

    def to_json(self) -> str:
        """Return a JSON list of {"name", "status", "detail", "fix"}."""
        return json.dumps([asdict(row) for row in self.rows], indent=1)

    def print(self, as_json: bool = False) -> None:
        """Print a table, or JSON."""
        if as_json:
            print(self.to_json())
            return
        table = Table("", "status", "found", "remedy")
        for row in self.rows:
            table.add_row(Text(row.name), Text(row.status, STYLES[row.status]), Text(row.detail), Text(row.fix))
        Console().print(table)


def doctor() -> Report:
    """Check the environment and the machine, in some seconds, without changes."""
    checks = (
        python, packages, torch, torchvision, gpu, dali_on_cpu, dali_on_gpu, triton, kernel_choice, deepspeed, onnx,
        apex, kernels_name, cores, memory, shared_memory, open_files, disk,
    )  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        return Report([future.result() for future in [pool.submit(check) for check in checks]])


def probe(code: str) -> tuple[bool, str]:
    """Run Python code in a separate process; return (success, last output line)."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return False, f"timed out after {PROBE_TIMEOUT_S} s"
    output = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, output[-1] if output else f"exit code {done.returncode}"


def probed(name: str, code: str, fix: str, otherwise: Literal["warn", "broken"] = "warn") -> Row:
    """Run ``code`` as in ``probe`` and return its row, see ``verdict``."""
    works, output = probe(code)
    return verdict(name, output, works, fix, otherwise)


def verdict(name: str, detail: str, good: bool, fix: str, otherwise: Literal["warn", "broken"] = "warn") -> Row:
    """Return a row; ``fix`` and the status ``otherwise`` if it is not ``good``."""
    return Row(name, "ok", detail) if good else Row(name, otherwise, detail, fix)


def python() -> Row:
    """Check the Python version and that a free-threaded one has no lock."""
    version = sys.version_info
    detail = f"{version.major}.{version.minor}.{version.micro}"
    supported = (3, 11) <= version[:2] < (3, 15)
    if supported and sysconfig.get_config_var("Py_GIL_DISABLED") and getattr(sys.flags, "gil", None) != 0:
        detail += ", free-threaded, but Triton turns the interpreter's lock on"
        return Row("python", "warn", detail, "export PYTHON_GIL=0, so that data threads do not wait for the lock")
    return verdict("python", detail, supported, "use Python 3.11 to 3.14", "broken")


def packages() -> Row:
    """Check that all required packages are installed."""
    required = [
        re.split(r"[<>=!~\[; ]", line)[0] for line in metadata.requires("fastdeitlt") or () if "extra ==" not in line
    ]
    absent = [name for name in required if version_of(name) is None]
    if absent:
        return Row("packages", "broken", f"missing: {', '.join(absent)}", f"pip install {' '.join(absent)}")
    return Row("packages", "ok", f"all {len(required)} required packages are installed")


def version_of(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def torch() -> Row:
    """Check that torch imports and computes."""
    works, output = probe(
        "import torch; torch.ones(2, 2) @ torch.ones(2, 2); print(torch.__version__, torch.version.cuda)"
    )
    if not works:
        return Row("torch", "broken", output, "pip install torch==2.14.1 torchvision==0.29.1")
    version, cuda = output.split()
    return Row("torch", "ok", f"{version}, {'CPU build' if cuda == 'None' else f'built for CUDA {cuda}'}")


def torchvision() -> Row:
    """Check that torchvision's operators match torch, as timm requires."""
    code = "import torchvision, torch; torch.ops.torchvision.nms; print(torchvision.__version__)"
    fix = "install the torchvision for this torch from the same index: 0.26 for 2.11, up to 0.29 for 2.14"
    return probed("torchvision", code, fix, "broken")


def gpu() -> Row:
    """Check for a GPU that torch can use."""
    code = (  # also compute: this torch may have no code for the GPU
        "import torch; p = torch.cuda.get_device_properties(0); (torch.ones(9, device='cuda') + 1).tolist(); "
        "print(p.name, 'with', p.total_memory >> 30, 'GiB', '' if p.major > 7 else 'without bfloat16')"
    )
    works, output = probe(code)
    smi = shutil.which("nvidia-smi")
    if not smi and not works:
        return Row("gpu", "missing", "none, training runs on the CPU", "use an NVIDIA GPU except for small data sets")
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"] if smi else ["true"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    detail = f"{output}, driver {driver[0] if driver else 'unknown'}"
    return verdict("gpu", detail, works, "install a driver for CUDA 13 (580 or newer), or a CUDA build of torch")


DECODE = """
import sys, numpy, torch
from PIL import Image
from fastdeitlt.data.sets import embedded
from fastdeitlt.data.pixels.files import read_encoded
from fastdeitlt.data.pixels.decoder import Decoder, decoder_version
path = sorted(embedded.unpack().rglob("*.png"))[0]
file = read_encoded(str(path))
(pixels,) = Decoder(1, torch.device("{device}"))([file], numpy.array([[0, 0, file.height, file.width]], numpy.int32))
expected = numpy.array(Image.open(path).convert("RGB"))
assert (pixels.cpu().numpy() == expected).all(), "pixels differ from Pillow's"
print(decoder_version(), "decodes the same pixels as Pillow")
"""


def dali_on_cpu() -> Row:
    """Check that DALI decodes a real image on the CPU."""
    fix = "pip install nvidia-dali-cuda130==2.4.* (also without a GPU)"
    return probed("dali on cpu", DECODE.format(device="cpu"), fix, "broken")


def _has_gpu() -> bool:
    """Return whether NVIDIA's driver exists, with or without nvidia-smi."""
    return bool(shutil.which("nvidia-smi")) or Path("/dev/nvidiactl").exists()


def dali_on_gpu() -> Row:
    """Check that DALI decodes a real image on the GPU, if there is one."""
    if not _has_gpu():
        return Row("dali on gpu", "missing", "no GPU")
    fix = "pip install nvidia-dali-cuda130==2.4.* (drivers before 580: nvidia-dali-cuda120)"
    return probed("dali on gpu", DECODE.format(device="cuda"), fix)


def triton() -> Row:
    """Check that Triton has a GPU to compile for, or its interpreter."""
    code = (
        "import triton, torch; d = triton.runtime.driver.active.get_current_target() if torch.cuda.is_available() "
        "else None; print(triton.__version__, 'compiles for ' + f'{d.backend} {d.arch}' if d else 'without a GPU: "
        "kernels run only in its interpreter (TRITON_INTERPRET=1), for tests')"
    )
    return probed("triton", code, "pip install triton, or set impl=torch")


def kernel_choice() -> Row:
    """Count the measurements from which `auto` selects kernels on this GPU."""
    if not _has_gpu():
        return Row("kernel choice", "missing", "no GPU: auto uses torch")
    works, output = probe(
        "import torch; from fastdeitlt.kernels._measured import gpu_name, rows_of; gpu = gpu_name(0); "
        "print(sum(row.gpu == gpu for row in rows_of(0).values()), 'measurements on', gpu)"
    )
    fix = "measured at the first start of train; 'fastdeitlt tune RECIPE' measures more"
    return verdict("kernel choice", output, works and not output.startswith("0 "), fix)


def deepspeed() -> Row:
    """Check that DeepSpeed imports; only training on several GPUs needs it."""
    install = "DS_BUILD_OPS=0 pip install deepspeed==0.19.8 (no compiler or CUDA toolkit needed)"
    if version_of("deepspeed") is None:
        return Row("deepspeed", "missing", "not installed, needed for several GPUs", install)
    return probed("deepspeed", "import deepspeed; print(deepspeed.__version__)", install)


def onnx() -> Row:
    """Check the packages of `export --format onnx`."""
    install, names = "pip install 'fastdeitlt[onnx]'", ("onnx", "onnxruntime", "onnxscript")
    absent = [name for name in names if version_of(name) is None]
    if absent:
        return Row("onnx", "missing", f"{', '.join(absent)} not installed, needed to export ONNX", install)
    code = "import onnx, onnxruntime, onnxscript; print(onnx.__version__, onnxruntime.__version__)"
    return probed("onnx", code, install)


def apex() -> Row:
    """Check for NVIDIA's apex, an optional backend; PyPI's apex is unrelated."""
    source = "optional: build NVIDIA/apex from source with CUDA extensions"
    if find_spec("amp_C"):
        return Row("apex", "ok", "NVIDIA apex with CUDA extensions")
    if find_spec("apex"):
        detail = "a package apex without amp_C: PyPI's unrelated apex, or NVIDIA apex without CUDA extensions"
        return Row("apex", "warn", detail, f"pip uninstall apex; {source}")
    return Row("apex", "missing", "not installed", f"{source} (`pip install apex` is an unrelated package)")


def kernels_name() -> Row:
    """Check that ``fastdeitlt.kernels`` does not hide PyPI's package ``kernels``."""
    version, spec, ours = version_of("kernels"), find_spec("kernels"), find_spec("fastdeitlt.kernels")
    if ours is None or not ours.origin:
        return Row("kernels name", "broken", "fastdeitlt.kernels is not importable", "reinstall fastdeitlt")
    is_ours = spec is not None and bool(spec.origin) and Path(str(spec.origin)).samefile(ours.origin)
    if version and is_ours:
        fix = "start Python outside the repository root"
        return Row("kernels name", "warn", f"./kernels hides PyPI's kernels {version} in this folder", fix)
    beside = f" beside PyPI's kernels {version}" if version else ""
    return Row("kernels name", "ok", f"fastdeitlt.kernels{beside}")


def cores() -> Row:
    """Compare this process's usable cores with its threads."""
    usable = usable_cores()
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a number for each level of nesting
    threads = int(first) if first.isdecimal() else len(os.sched_getaffinity(0))  # as OpenMP
    detail = f"{usable} usable, {counted(threads, 'thread')} per process"
    return verdict("cores", detail, threads <= usable, f"export OMP_NUM_THREADS={usable}")


def memory() -> Row:
    """Check the memory available to this process."""
    room = available_memory()
    fix = "the demo needs 4 GiB: close programs or use a larger machine"
    return verdict("memory", f"{room / GIB:.1f} GiB free", room > 4 * GIB, fix)


def shared_memory() -> Row:
    """Check /dev/shm, which NCCL uses between ranks."""
    if not Path("/dev/shm").is_dir():
        return Row("shared memory", "warn", "no /dev/shm", "needed for several GPUs: docker run --shm-size=8g")
    size = shutil.disk_usage("/dev/shm").total
    fix = "several GPUs need more: docker run --shm-size=8g"
    return verdict("shared memory", f"/dev/shm of {size / GIB:.1f} GiB", size >= GIB, fix)


def open_files() -> Row:
    """Check the limit on open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft >= 1024 or soft == resource.RLIM_INFINITY
    return verdict("open files", f"at most {soft:,}", enough, f"ulimit -n {min(65536, hard)}")


def disk() -> Row:
    """Check the disk space for run folders; a ViT-B checkpoint has about 1.4 GB."""
    room = shutil.disk_usage(".").free
    fix = "a ViT-B run needs about 5 GB for checkpoints: set runs_dir=... to another disk"
    return verdict("disk", f"{room / GIB:.1f} GiB free in {Path.cwd()}", room > 5 * GIB, fix)
