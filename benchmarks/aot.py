"""Ahead-of-time gate: compile every shipped kernel configuration for every architecture, without a GPU.

    python -m benchmarks.aot [op ...] [--sm 80 86 89 90 100 120] [--sample N] [--json]

Fails (exit code 1) if a configuration cannot be launched, does not compile, uses local memory (register spills),
exceeds the shared or tensor memory of the architecture, has no tensor-core instructions where expected, or more narrow
stores than expected. No spills does not mean fast: ``blocks`` is the number of programs on a multiprocessor at once,
``code`` and ``loop`` are the instructions of a kernel and of its longest loop.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastdeitlt.errors import counted

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
TENSOR_MEMORY_COLUMNS = 512
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
BLOCKS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
REGISTERS, REGISTER_UNIT = 65536, 256  # of a multiprocessor; allocated to a warp in units
MMA_OPCODES = ("HMMA", "HGMMA", "UTCHMMA")
LOCAL_MEMORY_OPCODES = ("LDL", "STL")
POINTEES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64,
    "u8": torch.uint8, "i32": torch.int32, "i64": torch.int64,
}  # fmt: skip
NARROW_STORE = r"\bSTG\b(?!\S*\.(?:64|128)\b)"


@dataclass
class Row:
    """Result of one configuration on one architecture; without ``problems`` it passes."""

    op: str
    kernel: str
    sm: int
    configuration: str
    registers: int = -1
    stack_bytes: int = -1
    spill_instructions: int = -1
    shared_bytes: int = -1
    tensor_memory: int = 0
    blocks: int = -1
    narrow_stores: int = -1
    instructions: int = -1
    loop_instructions: int = -1
    mma_opcodes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def ops() -> list[str]:
    """Return the modules of ``fastdeitlt.kernels`` that contain an op."""
    import fastdeitlt.kernels

    return [m.name for m in pkgutil.iter_modules(fastdeitlt.kernels.__path__) if not m.name.startswith("_")]


def gate(names: list[str], architectures: list[int], sample: int = 0) -> list[Row]:
    """Compile the configurations of ops in a process without Triton's interpreter.

    Args:
        names: ops of ``fastdeitlt.kernels``, or importable modules (with a dot) that have ``aot_configs``.
        architectures: compute capabilities; a configuration is skipped on those it does not ship for.
        sample: at most this many configurations of each kernel and architecture, from the first to the last; 0 = all.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.pop("TRITON_INTERPRET", None)
    sm = [str(architecture) for architecture in architectures]
    command = [sys.executable, "-m", "benchmarks.aot", *names, "--json", "--sample", str(sample), "--sm", *sm]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    if done.returncode not in (0, 1) or not done.stdout:
        raise RuntimeError(f"benchmarks.aot: exit code {done.returncode}: {done.stderr[-2000:]}")
    return [Row(**row) for row in json.loads(done.stdout)]


def compile_op(name: str, architectures: list[int], sample: int = 0) -> Iterator[Row]:
    """Yield the rows of one op; a module without configurations is a failing row."""
    module = importlib.import_module(name if "." in name else f"fastdeitlt.kernels.{name}")
    configs = module.aot_configs() if hasattr(module, "aot_configs") else []
    if not configs:
        yield Row(name, "-", 0, "-", problems=[f"{module.__name__} has no aot_configs()"])
    pairs = [(config, sm) for config in configs for sm in architectures if sm in config.architectures]
    for config, sm in _spread(pairs, sample) if sample else pairs:
        yield compile_one(name, config, sm)


def _spread(pairs: list[tuple[Any, int]], sample: int) -> Iterator[tuple[Any, int]]:
    """Yield at most ``sample`` configs per kernel and architecture, evenly spaced."""
    groups: dict[tuple[str, int], list[Any]] = {}
    for config, sm in pairs:
        groups.setdefault((config.kernel.__name__, sm), []).append(config)
    for (_, sm), group in groups.items():
        places = {round(i * (len(group) - 1) / max(sample - 1, 1)) for i in range(sample)}
        yield from ((group[place], sm) for place in sorted(places))


def compile_one(op: str, config: Any, sm: int) -> Row:
    """Compile one ``AotConfig`` for one architecture and check its machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompilationError, compile
    from triton.runtime.errors import OutOfResources, PTXASError

    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    options["enable_fp_fusion"], target = config.fp_fusion, GPUTarget("cuda", sm, 32)
    row = Row(op, config.kernel.__name__, sm, _describe(config), problems=_launch_problems(config, target))
    try:
        compiled = compile(_source(config), target=target, options=options)
    except (CompilationError, OutOfResources, PTXASError, RuntimeError) as error:
        row.problems.append(f"does not compile: {' '.join(str(error).split())[:300]}")
        return row
    usage, code = _machine_code(compiled.asm["cubin"])
    row.registers, row.stack_bytes = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
    row.spill_instructions = sum(_count(code, opcode) for opcode in LOCAL_MEMORY_OPCODES)
    row.narrow_stores = len(re.findall(NARROW_STORE, code))
    row.instructions, row.loop_instructions = instruction_counts(code)
    row.mma_opcodes = {opcode: count for opcode in MMA_OPCODES if (count := _count(code, opcode))}
    row.shared_bytes = compiled.metadata.shared
    row.tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    row.blocks = blocks_at_once(sm, config.num_warps, row.registers, row.shared_bytes, row.tensor_memory)
    row.problems += _problems(row, config)
    return row


def blocks_at_once(sm: int, warps: int, registers: int, shared: int, tensor_memory: int) -> int:
    """Return the blocks resident on a multiprocessor.

    Source: CUDA C++ programming guide, compute capabilities.

    Args:
        registers: registers of a thread.
        shared: bytes of a block; the system uses 1 KiB more.
        tensor_memory: columns of a block.
    """
    of_a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    limits = [
        BLOCKS[sm],
        WARPS[sm] // warps,
        REGISTERS // (of_a_warp * warps),
        (SHARED_BYTES[sm] + 1024) // (shared + 1024),
    ]
    return min(*limits, TENSOR_MEMORY_COLUMNS // max(tensor_memory, 1))


def instruction_counts(code: str) -> tuple[int, int]:
    """Count the instructions of a disassembled kernel and its longest loop.

    A loop is from a label to a branch back to it, except the branch to itself after every kernel.
    """
    labels: dict[str, int] = {}
    total = longest = 0
    for text in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", text):
            labels[label[1]] = total
        elif re.match(r"\s+/\*[0-9a-f]+\*/", text) and not re.search(r"\bNOP\b", text):
            total += 1
            back = re.search(r"\bBRA\b.*(\.L_x_\d+)", text)
            length = total - labels[back[1]] if back and back[1] in labels else 0
            longest = max(longest, length if length > 1 else 0)
    return total, longest


def _problems(row: Row, config: Any) -> list[str]:
    problems = []
    if row.stack_bytes or row.spill_instructions:
        problems.append(
            f"{counted(row.spill_instructions, 'local-memory instruction')}, {row.stack_bytes} bytes of stack"
        )
    if row.shared_bytes > SHARED_BYTES[row.sm]:
        problems.append(f"{row.shared_bytes} bytes of shared memory, expected at most {SHARED_BYTES[row.sm]}")
    if row.tensor_memory > TENSOR_MEMORY_COLUMNS:
        problems.append(f"{row.tensor_memory} columns of tensor memory, expected at most {TENSOR_MEMORY_COLUMNS}")
    if config.mma and not row.mma_opcodes:
        problems.append("no tensor-core instruction")
    if config.narrow_stores is not None and row.narrow_stores > config.narrow_stores:
        problems.append(
            f"{counted(row.narrow_stores, 'store')} of less than 8 bytes, expected at most {config.narrow_stores}"
        )
    return problems


def _source(config: Any) -> Any:
    from triton.compiler import ASTSource

    names = config.kernel.arg_names
    got = set(config.signature) | set(config.constexprs)
    if got != set(names) or set(config.signature) & set(config.constexprs):
        raise ValueError(f"aot_configs of {config.kernel.__name__}: got arguments {sorted(got)}, expected {names}")
    kinds = {name: "constexpr" if name in config.constexprs else config.signature[name] for name in names}
    anywhere = {param.name for param in config.kernel.params if param.do_not_specialize_on_alignment}
    aligned = [n for n in names if (kinds[n].startswith("*") and n not in anywhere) or n in config.divisible_by_16]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(fn=config.kernel, signature=kinds, constexprs=dict(config.constexprs), attrs=attributes)


def _launch_problems(config: Any, target: Any) -> list[str]:
    """Return errors of binding arguments as the launcher does, such as a wrong name."""
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import MockTensor, create_function_from_signature

    examples = {name: 0.5 if kind.startswith("fp") else 17 for name, kind in config.signature.items()}
    examples |= {n: MockTensor(POINTEES[kind[1:]]) for n, kind in config.signature.items() if kind.startswith("*")}
    bind = create_function_from_signature(config.kernel.signature, config.kernel.params, make_backend(target))
    try:
        bind(**examples, **config.constexprs)
    except TypeError as error:
        return [f"cannot be launched: {error}"]
    return []


def _machine_code(cubin: bytes) -> tuple[str, str]:
    """Return resource usage and disassembly, by the tools in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([_tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True)
        code = subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True)
    return usage.stdout, code.stdout


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else -1


def _count(code: str, opcode: str) -> int:
    return len(re.findall(rf"\b{opcode}\b", code))


def _describe(config: Any) -> str:
    types = sorted({kind.removeprefix("*") for kind in config.signature.values() if kind.startswith("*")})
    blocks = " ".join(f"{name}={value}" for name, value in config.constexprs.items() if value is not None)
    return f"{config.note or blocks} {'/'.join(types)} warps={config.num_warps} stages={config.num_stages}"


HEADER = (
    f"{'op':14} {'kernel':26} {'sm':>3} {'regs':>4} {'stack':>5} {'spill':>5} {'shared':>6} {'tmem':>4} {'blocks':>6} "
    f"{'code':>5} {'loop':>5} {'mma':12}"
)


def line(row: Row) -> str:
    """Format a row as text for ``HEADER``."""
    mma = " ".join(f"{opcode}:{count}" for opcode, count in row.mma_opcodes.items()) or "-"
    return (
        f"{row.op:14} {row.kernel:26} {row.sm:3} {row.registers:4} {row.stack_bytes:5} {row.spill_instructions:5} "
        f"{row.shared_bytes:6} {row.tensor_memory:4} {row.blocks:6} {row.instructions:5} {row.loop_instructions:5} "
        f"{mma:12} {row.configuration}  {'; '.join(row.problems) or 'ok'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help="ops of fastdeitlt.kernels, or dotted modules; default: all")
    parser.add_argument("--sm", type=int, nargs="+", default=sorted(SHARED_BYTES), choices=sorted(SHARED_BYTES))
    parser.add_argument(
        "--sample", type=int, default=0, help="configurations per kernel and architecture; default: all"
    )
    parser.add_argument("--json", action="store_true", help="print rows as JSON instead of a table")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error(
            "TRITON_INTERPRET: got 1, expected unset, because interpreted kernels cannot be compiled; unset it"
        )
    rows: list[Row] = []
    for name in arguments.ops or ops():
        for row in compile_op(name, arguments.sm, arguments.sample):
            if not arguments.json:
                print(line(row) if rows else f"{HEADER}\n{line(row)}", flush=True)
            rows.append(row)
    failed = sum(bool(row.problems) for row in rows)
    print(json.dumps([asdict(row) for row in rows]) if arguments.json else f"{len(rows)} compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
