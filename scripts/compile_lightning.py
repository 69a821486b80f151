"""The overlapped lightning kernel compiled for Hopper on any machine: registers, shared memory, spills, waits.

    pip install --target DIR --no-deps triton==3.6.0
    PYTHONPATH=DIR python scripts/compile_lightning.py [--dim 128] [--out FOLDER] [chunk block warps stages ...]

Needs Triton, whose wheel has NVIDIA's assembler, and no GPU. Without tiles it takes those of an H200. Each pass is one
line; what ptxas says of its products follows: C7514 means that each is waited for at once, C7517 a wait that it put in.
`--out` keeps each pass's PTX and machine code, by which two versions of the kernel can be compared.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from cispo.ops.lightning_tiles import Pass, Tiles, tiles_of

POINTERS = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "grad": "*bf16", "out": "*bf16", "out_2": "*bf16"}
OTHERS = {"slopes": "*fp32", "cu_seqlens": "*i32"}
SIZES = ("documents", "heads", "segment_tokens", "row", "head_row", "owner_stride")
UNUSED = {"out": ("grad", "out_2"), "dq": ("out_2",), "dk_dv": ()}
COUNTED = {"HGMMA": "products", "STL": "spills", "WARPGROUP.DEPBAR": "waits", "BAR.SYNC": "barriers"}
"""Instruction -> its column."""
LIMIT = 227 * 1024
"""Bytes of a multiprocessor's shared memory that a program may have."""


def compiled(kind: Pass, dim: int, tiles: Tiles) -> Any:
    """Triton's result, of a document of one segment without states."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.experimental.gluon._runtime import GluonASTSource  # pyright: ignore[reportMissingImports]

    from cispo.ops.lightning_overlap import overlapped_kernel

    names: list[str] = overlapped_kernel.arg_names  # pyright: ignore[reportFunctionMemberAccess]
    block = {"D": dim, "BT": tiles.chunk, "BD": dim, "BV": tiles.block, "MODE": kind, "STAGES": tiles.stages}
    types = {**POINTERS, **OTHERS, **dict.fromkeys(SIZES, "i32")}
    types = {name: kept for name, kept in types.items() if name not in UNUSED[kind]}
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {name: block.get(name) for name in names if name not in types}
    even = [name for name in names if signature[name].startswith("*") or name in ("row", "head_row")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = GluonASTSource(overlapped_kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tiles.warps})


def tool(name: str) -> str:
    import triton  # pyright: ignore[reportMissingImports]

    file = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / name
    file.chmod(0o755)  # an unpacked wheel's are not executable
    return str(file)


def output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def report(kind: Pass, dim: int, tiles: Tiles, folder: Path) -> None:
    """Prints a pass's line and the assembler's words; leaves its files in `folder`."""
    found = compiled(kind, dim, tiles)
    name = f"{kind}_{dim}_" + "_".join(str(n) for n in (tiles.chunk, tiles.block, tiles.warps, tiles.stages))
    binary, text, code = (folder / f"{name}.{end}" for end in ("cubin", "ptx", "sass"))
    binary.write_bytes(found.asm["cubin"])
    text.write_text(found.asm["ptx"])
    code.write_text(output_of(tool("nvdisasm"), "-c", str(binary)))
    usage = re.search(r"REG:(\d+)", output_of(tool("cuobjdump"), "-res-usage", str(binary)))
    counts = {meaning: len(re.findall(rf"\b{re.escape(word)}", code.read_text())) for word, meaning in COUNTED.items()}
    fits = "" if found.metadata.shared <= LIMIT else f" (more than the {LIMIT:,} there are)"
    print(
        f"{kind:<6} {tuple(tiles[:4])} registers {usage[1] if usage else '?'}, shared memory {found.metadata.shared:,}"
        f"{fits}, {', '.join(f'{meaning} {count}' for meaning, count in counts.items())}"
    )
    said = output_of(tool("ptxas"), "-v", "-arch=sm_90a", str(text), "-o", str(folder / "again.cubin"))
    for line in said.splitlines():
        if "(C75" in line:
            print("      ", line.partition(":")[2].strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tiles", nargs="*", type=int, metavar="N", help="chunk, block, warps, stages; more than one set"
    )
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--out", type=Path, help="folder of the PTX and machine code")
    options = parser.parse_args()
    if find_spec("triton") is None:
        raise SystemExit("compile_lightning.py needs Triton on PYTHONPATH")
    if len(options.tiles) % 4:
        parser.error("tiles are sets of four numbers: chunk, block, warps, stages")
    sets = zip(*(options.tiles[i::4] for i in range(4)), strict=True)
    given = [Tiles(*one, resident=1, overlapped=True) for one in sets]
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        passes: tuple[Pass, ...] = ("out", "dq", "dk_dv")
        for kind in passes:
            for tiles in given or [tiles_of("H200", kind, torch.bfloat16, options.dim)]:
                report(kind, options.dim, tiles, folder)


if __name__ == "__main__":
    main()
