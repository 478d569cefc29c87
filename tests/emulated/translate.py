"""The package's own headers as C++ for the CPU: PTX becomes calls of cuda.hpp, and a WGMMA atom names its shape.

Every piece of PTX that a kernel reaches is in one of a few one-line functions; a pattern that no longer matches is an
error, so a new one cannot go unnoticed.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from fp4gemm.render import template_dir

HERE = Path(__file__).parent
CUTE_TOKENS = (8, 16, 32, 64, 96, 128, 192, 256)

_RULES: dict[str, tuple[tuple[str, str], ...]] = {
    "numeric.hpp": (
        (r"#pragma once", '#pragma once\n#include "cuda.hpp"'),
        (r'asm volatile\("" : "\+[fr]"\(v\)::"memory"\);', ";"),
        (
            r'uint16_t pair;\s*asm\("cvt\.rn\.satfinite.*?return static_cast<uint8_t>\(pair\);',
            "return to_e4m3_byte(v);",
        ),
        (
            r'uint32_t both;\s*asm\("cvt\.rn\.f16x2\.e4m3x2.*?return both;',
            "return float_to_half(e4m3_to_float(bytes & 255)) | float_to_half(e4m3_to_float(bytes >> 8)) << 16;",
        ),
        (
            r'uint32_t word;\s*asm\(\s*"\{\\n\.reg \.b8.*?return word;',
            "uint32_t word = 0; for (int i = 7; i >= 0; --i) word = word << 4 | to_e2m1(value(i)); return word;",
        ),
        (
            r'asm\("\{\\n\.reg \.b8 b<4>;\\nmov\.b32 \{b0.*?"r"\(word\)\);',
            "for (int i = 0; i < 4; ++i, word >>= 8) pairs[i] = e2m1_to_half(word) | e2m1_to_half(word >> 4) << 16;",
        ),
        (r'float v;\s*asm\("cvt\.f32\.f16.*?return v;', "return half_bits_to_float(bits);"),
        (r'uint32_t m;\s*asm\("max\.NaN\.xorsign\.abs\.bf16x2.*?return m;', "return max_xorsign(a, b, 0x7F80);"),
        (r'uint32_t m;\s*asm\("max\.NaN\.xorsign\.abs\.f16x2.*?return m;', "return max_xorsign(a, b, 0x7C00);"),
        (
            r'uint32_t w;\s*asm\("cvt\.rn\.bf16x2\.f32.*?return w;',
            "return float_to_bf16(low) | float_to_bf16(high) << 16;",
        ),
        (
            r'uint32_t w;\s*asm\("cvt\.rn\.f16x2\.f32.*?return w;',
            "return float_to_half(low) | float_to_half(high) << 16;",
        ),
        (r'asm\("max\.NaN\.xorsign\.abs\.f32[^;]*;"\s*:[^;]*;', "m = max_xorsign(m, value(x, i));"),
    ),
    "values.hpp": (
        (r"uint32_t v;\s*asm\(.*?return v;", "return multiply_bf16x2(multiply_bf16x2(bits, scale_), unit_);"),
        (r'asm\("mul\.f16x2[^;]*;"[^;]*;', "half = multiply_f16x2(e4m3_to_half2(scale), 0x58005800u);"),
    ),
    "philox.hpp": (
        (r'asm\("lop3\.b32[^;]*;"[^;]*;', "both = (a & kMask) | (b & ~kMask);"),
        (
            r'asm\("\{\\n\.reg \.b64.*?\);',
            "product = {static_cast<uint32_t>(uint64_t{a} * b), static_cast<uint32_t>(uint64_t{a} * b >> 32)};",
        ),
        (
            r'asm\("cvt\.rz\.f16x2[^;]*;"[^;]*;',
            "places = float_to_half_rz(low) | float_to_half_rz(high) << 16;",
        ),
    ),
    "quantize.hpp": (),
    "quantize_config.hpp": (),
    "scale_writer.hpp": (),
    "amax.hpp": (),
    "rows.hpp": ((r'asm volatile\("(cp\.async\.bulk\.|)prefetch.*?\);', ";"),),
    "packed.hpp": (
        (r'asm\("lop3\.b32[^;]*;"[^;]*;', "x = (a & kSharedBits) | (b & ~kSharedBits);"),
        (
            r"if constexpr \(kHigh\) \{\s*asm.*?\} else \{\s*asm.*?\}\s*return both;",
            "both = (kHigh ? pair >> 16 : pair & 0xFFFFu) * 0x10001u; return both;",
        ),
        (r'uint32_t v;\s*asm\("mul\.bf16x2.*?return v;', "return multiply_bf16x2(codes, scale);"),
        (r'uint32_t v;\s*asm\("mul\.f16x2.*?return v;', "return multiply_f16x2(codes, scale);"),
    ),
    "pack.hpp": (
        (r'asm\("mul\.f16x2[^;]*;"[^;]*(0x\w+)u\)\);', r"halves = multiply_f16x2(halves, \1u);"),
        (
            r'asm\("cvt\.rn\.satfinite\.e4m3x2[^;]*;"[^;]*;',
            "bytes = to_e4m3_byte(half_bits_to_float(halves)) | to_e4m3_byte(half_bits_to_float(halves >> 16)) << 8;",
        ),
    ),
    "packed_gemm.hpp": ((r'uint32_t v;\s*asm volatile\("movmatrix.*?return v;', "return transpose_matrix(pair);"),),
    "packed_tiles.hpp": (),
    "pieces.hpp": (),
    "packed_mma.hpp": (),
    "packed_mma_config.hpp": (
        (
            r"if constexpr \(Operand::kBf16\) \{\s*asm\(.*?\} else \{\s*asm\(.*?\n  \}\n\}",
            "multiply_matrices(c, a, b0, b1, Operand::kBf16);\n}",
        ),
    ),
    "packed_wgmma_config.hpp": (
        (r"Atom::fma\(.*?\);", "multiply_warpgroup<Atom::kTokens, Atom::kBf16>(a, b, acc);"),
        (
            r"#define FP4GEMM_WGMMA_48.*?#undef FP4GEMM_WGMMA_48",
            "template <bool kIsBf16> struct Wgmma48"
            " { static constexpr int kTokens = 48; static constexpr bool kBf16 = kIsBf16; };",
        ),
    ),
    "packed_wgmma_results.hpp": (),
    "packed_wgmma.hpp": (),
    "convention.hpp": (),
    "hadamard.hpp": (),
    "quick_scales.hpp": (
        (r'uint16_t pair;\s*asm\("cvt\.rn\.satfinite.*?return pair;', "return to_e4m3_byte(v);"),
        (r'float r;\s*asm\("rcp.*?return r;', "return 1.0f / v;"),
    ),
    "quantize_tile.hpp": (),
    "tile_scales.hpp": (),
    "amax_tile.hpp": (),
    "group.hpp": (),
    "work_items.hpp": (),
    "quantize_group.hpp": (),
    "amax_group.hpp": (),
    "tile.hpp": ((r'asm volatile\("" : "\+r"\(v\)\);', ""),),
    "encode.hpp": (),
    "adaptive.hpp": (),
    "residual.hpp": (),
    "producer.hpp": (),
    "norm.hpp": (),
    "layout.hpp": (),
    "search.hpp": (),
}

_ATOM = (
    "template <Major, Major> struct MMA_64x{n}x16_F32{t}{t}_RS"
    " {{ static constexpr int kTokens = {n}; static constexpr bool kBf16 = {b}; }};"
)
_STAND_INS = {
    "nvrtc/std.hpp": "",
    "cute/numeric/integer_sequence.hpp": (
        "#include <utility>\nnamespace cute { template <class T, T... I> using integer_sequence ="
        " std::integer_sequence<T, I...>; template <class T, T N> using make_integer_sequence ="
        " std::make_integer_sequence<T, N>; }"
    ),
    "cutlass/arch/reg_reconfig.h": (
        "namespace cutlass::arch { template <unsigned> void warpgroup_reg_alloc() {}"
        " template <unsigned> void warpgroup_reg_dealloc() {} }"
    ),
    "cute/arch/mma_sm90_gmma.hpp": "\n".join(
        (
            "namespace cute { inline void warpgroup_arrive() {} inline void warpgroup_commit_batch() {}",
            "template <int> void warpgroup_wait() {} }",
            "namespace cute::SM90::GMMA { enum class Major { K }; enum class ScaleOut { One };",
            *(_ATOM.format(n=n, t=t, b=b) for n in CUTE_TOKENS for t, b in (("BF16", "true"), ("F16", "false"))),
            "}",
        )
    ),
}


def translate(folder: Path) -> None:
    """Write the headers to ``folder``. Raises ValueError where PTX is left, or a rule finds nothing."""
    own = folder / "fp4gemm"
    own.mkdir(parents=True)
    for name, rules in _RULES.items():
        text = (template_dir() / "include/fp4gemm" / name).read_text(encoding="utf-8")
        for pattern, replacement in rules:
            text, count = re.subn(pattern, replacement, text, flags=re.DOTALL)
            if not count:
                raise ValueError(f"{name}: nothing matches {pattern!r}")
        if left := re.findall(r"^[^/\n]*\basm\b.*", text, flags=re.MULTILINE):
            raise ValueError(f"{name}: PTX without a translation: {left}")
        (own / name).write_text(text, encoding="utf-8")
    shutil.copy(HERE / "async.hpp", own / "async.hpp")
    shutil.copy(HERE / "cuda.hpp", folder / "cuda.hpp")
    for name, text in _STAND_INS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"#pragma once\n{text}\n", encoding="utf-8")
