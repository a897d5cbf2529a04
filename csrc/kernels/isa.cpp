#include "kernels/isa.h"

#include <cstdlib>
#include <cstring>

namespace ddpp {
namespace {

constexpr Isa kAll[] = {Isa::base, Isa::avx2, Isa::avx512};

Isa choose() {
  const char* wanted = std::getenv("DDPP_CPU_ISA");
  Isa best = Isa::base;
  for (const Isa isa : kAll) {
    if (!isa_runs_here(isa)) continue;
    best = isa;
    if (wanted && !std::strcmp(wanted, isa_name(isa))) break;
  }
  return best;
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

bool isa_runs_here(Isa isa) {
#if DDPP_EVERY_ISA
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == Isa::base;
}

const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "base"; }

}  // namespace ddpp
