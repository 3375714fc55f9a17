"""Every kernel compiled to machine code for GPUs that need not be here, at the shapes of SD3.5-M and SD1.5 at 512 px.

Run as a script, `test_compiled.py CASE`, this file compiles the launches of one case and prints what came out as JSON;
the tests run it so, in processes where Triton is not its own interpreter (see tests/conftest.py).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

TARGETS = {  # name: (backend, architecture, threads of a warp, shared memory of a program in bytes)
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
BATCH = 16
LATENTS = {"sd35": (16, 64, 64), "sd15": (4, 64, 64)}  # C, H, W
TOKENS = {"sd35": (1024, 1536), "sd15": (64, 1280)}  # N, D: image tokens of a block, mid-block tokens of the UNet

FEW = {"ppo-few"}  # cases of so few numbers that 16-byte accesses have nothing to gain
READS_ONLY = {  # cases or kernels: what they write is small
    "transition_log_prob-sd35",
    "transition_log_prob-sd15",
    "_pool_kernel",
    "_pool_backward_kernel",
}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Any numbers: launches are recorded, not run."""
    return torch.empty(shape, dtype=dtype)


# ------------------------------------------------------------------------------------------------------ the launches


def transition(model: str, part: str) -> None:
    from latent_critic.kernels import transition

    shape = (BATCH, *LATENTS[model])
    v, v_ref = (empty(*shape, dtype=torch.bfloat16) for _ in range(2))
    z, other, table, log_prob = empty(*shape), empty(*shape), empty(10, 3), empty(BATCH)
    step, seed, samples = empty(dtype=torch.int64), empty(dtype=torch.int64), empty(BATCH, dtype=torch.int64)
    if part == "step":
        transition.launch_step(v, z, other, table, step, 0, None, None)
        transition.launch_step(v, z, None, table, step, 0, seed, samples)
    elif part == "log_prob":
        transition.launch_log_prob(v, z, other, table, None, 3, v_ref)
        transition.launch_log_prob(v, z, other, table, None, 3, None)
    else:
        transition.launch_backward(v, z, other, v_ref, None, log_prob, log_prob, table, None, 3, True, False)
        transition.launch_backward(v, z, other, None, other, log_prob, None, table, None, 3, True, True)


def pool(model: str) -> None:
    from latent_critic.kernels import pool_tokens

    (tokens, dim), heads = TOKENS[model], 8
    h, q = empty(BATCH, tokens, dim, dtype=torch.bfloat16), empty(BATCH, heads, dim)
    outputs = pool_tokens.launch_pool(h, q)
    pool_tokens.launch_backward(empty(BATCH, heads, dim), h, q, *outputs, True)


def adaln(part: str) -> None:
    from latent_critic.kernels import adaln

    for n, d in TOKENS.values():
        x, y, statistics = *(empty(BATCH, n, d, dtype=torch.bfloat16) for _ in range(2)), empty(BATCH, n, 2)
        gate, scale, shift = empty(BATCH, 3 * d, dtype=torch.bfloat16).chunk(3, dim=1)
        if part == "modulate":
            adaln.launch_modulate(x, scale, shift)
        elif part == "modulate_backward":
            adaln.launch_modulate_backward(y, x, scale, statistics, True, True)
            adaln.launch_modulate_backward(y, x, scale, statistics, True, False)
        elif part == "gate":
            adaln.launch_gate(x, gate, y)
        else:
            adaln.launch_gate_backward(x, gate, y, True, True)
            adaln.launch_gate_backward(x, gate, y, False, True)


def ppo(samples: int, heads: int) -> None:
    from latent_critic.kernels import ppo

    policy = [empty(samples) for _ in range(3)]
    values = [empty(samples, heads) for _ in range(3)]
    scalars = [1e-4, 0.2, 5.0, 0.5]
    ppo.launch_ppo(*policy, *values, scalars)
    ppo.launch_ppo(*policy, None, None, None, scalars)
    ppo.launch_ppo(None, None, None, *values[:2], None, scalars)


CASES: dict[str, Callable[[], None]] = {
    **{
        f"transition_{part}-{model}": partial(transition, model, part)
        for part in ("step", "log_prob", "backward")
        for model in LATENTS
    },
    **{f"critic_pool-{model}": partial(pool, model) for model in TOKENS},
    **{f"adaln_{part}": partial(adaln, part) for part in ("modulate", "modulate_backward", "gate", "gate_backward")},
    "ppo-few": partial(ppo, BATCH, 3),
    "ppo-many": partial(ppo, 65536, 1),
}

# ---------------------------------------------------------------------------------------------------- compiling them


def compile_case(case: str) -> list[dict]:
    """One row a kernel and target: registers, spills, local and shared memory, number of global accesses by their bits.

    `longs` is the number of int64 arguments in memory, each of which is one 64-bit load of a CUDA device.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    launches, rows = [], []
    JITFunction.run = lambda kernel, *args, grid, warmup, **kwargs: launches.append((kernel, args, kwargs))
    for kind in ("cuda", "hip"):
        torch.version.hip = "7.0" if kind == "hip" else None  # some launches depend on it
        launches.clear()
        CASES[case]()
        targets = {name: GPUTarget(*target[:3]) for name, target in TARGETS.items() if target[0] == kind}
        for kernel, args, kwargs in launches:
            source, options = ASTSource(kernel, **specialize(kernel, args, kwargs)), compile_options(kernel, kwargs)
            for name, target in targets.items():
                compiled = triton.compile(source, target=target, options=options)
                usage = cuda_usage(compiled.asm["cubin"]) if kind == "cuda" else amd_usage(compiled.asm["amdgcn"])
                row = {"kernel": kernel.__name__, "target": name, "shared": compiled.metadata.shared}
                rows.append(row | usage | {"longs": list(source.signature.values()).count("*i64")})
    return rows


def specialize(kernel, args: tuple, kwargs: dict) -> dict:
    """What Triton's launcher would compile for these arguments: types, constants, divisibility by 16."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in kernel.arg_names}
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
    names |= {torch.int64: "i64", torch.int32: "i32"}
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + names[value.dtype]
            aligned = value.storage_offset() * value.itemsize % 16 == 0
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        else:
            signature[parameter.name], aligned = parameter.annotation_type or "fp32", False
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return {"signature": signature, "constexprs": constants, "attrs": attributes}


def compile_options(kernel, kwargs: dict) -> dict:
    return {name: value for name, value in kwargs.items() if name not in kernel.arg_names}


def cuda_usage(cubin: bytes) -> dict:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [knobs.nvidia.cuobjdump.path]
        usage = subprocess.run([*tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([*tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "local": numbers["LOCAL"] + numbers["STACK"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "loads": widths(sass, "LDG|LDGSTS"),
        "stores": widths(sass, "STG"),
    }


def widths(sass: str, instructions: str) -> dict[str, int]:
    found = re.findall(rf"\b(?:{instructions})\.E(?:\.[A-Z]\w*)*(?:\.(64|128)\b)?", sass)
    return Counter(bits or "32" for bits in found)


def amd_usage(assembly: str) -> dict:
    def number(key: str) -> int:
        return max(int(n) for n in re.findall(rf"\.{key}:\s*(\d+)", assembly))

    width = {"dword": "32", "dwordx2": "64", "dwordx3": "96", "dwordx4": "128"}

    def access_widths(access: str) -> dict[str, int]:
        found = re.findall(rf"\b(?:global|buffer)_{access}_(\w+)", assembly)
        return Counter(width.get(name, "16") for name in found)

    return {
        "registers": number("vgpr_count"),
        "local": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "loads": access_widths("load"),
        "stores": access_widths("store"),
    }


# --------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("case", CASES)
def test_no_spills_and_wide_accesses(case, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = subprocess.run(
        [sys.executable, "-P", Path(__file__), case], capture_output=True, text=True, env=environment
    )
    assert script.returncode == 0, script.stderr
    rows = json.loads(script.stdout)
    assert {row["target"] for row in rows} == set(TARGETS)
    for row in rows:
        assert row["spills"] == 0 and row["local"] == 0, row
        assert row["shared"] <= TARGETS[row["target"]][3], row
        if not row["kernel"].endswith("finish_kernel") and case not in FEW:  # those touch a few numbers a sample
            assert row["loads"].get("128") and (row["stores"].get("128") or {case, row["kernel"]} & READS_ONLY), row
            # bfloat16 read by fours would be a stream of 64-bit loads; a ROCm device reads its scalars otherwise.
            assert row["loads"].get("64", 0) <= (0 if row["target"].startswith("gfx") else row["longs"]), row


if __name__ == "__main__":
    print(json.dumps(compile_case(sys.argv[1])))
