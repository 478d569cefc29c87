// Stands before CuTe's header of this name, which hides make_tma_atom_A_sm100 and its like from NVRTC.
#pragma once

#include <cute/arch/copy_sm100_tma.hpp>
#include <cute/atom/copy_traits.hpp>
#include <cute/atom/copy_traits_sm90_tma.hpp>
#include <cute/tensor.hpp>

// There is no host here: what CuTe marks for it is device code from now on.
#undef CUTE_HOST
#define CUTE_HOST CUTE_HOST_DEVICE
#undef __CUDACC_RTC__
#include_next <cute/atom/copy_traits_sm100_tma.hpp>
#define __CUDACC_RTC__ 1
