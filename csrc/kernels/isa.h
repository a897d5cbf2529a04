// The instruction sets the CPU kernels are compiled for, and the choice among them at run time.
#pragma once

#if defined(__x86_64__) && !defined(DDPP_BASE_ONLY)
#define DDPP_EVERY_ISA 1
#else
#define DDPP_EVERY_ISA 0
#endif

namespace ddpp {

enum class Isa { base, avx2, avx512 };

// The best one this CPU runs, or the one named by DDPP_CPU_ISA=base|avx2|avx512 if it runs here.
Isa active_isa();
bool isa_runs_here(Isa isa);
const char* isa_name(Isa isa);

}  // namespace ddpp

// Declares something once per instruction set, in namespaces of their names.
// DDPP_SELECT(isa, f()) calls the one that `isa` names.
#if DDPP_EVERY_ISA
#define DDPP_PER_ISA(...) \
  namespace base {        \
  __VA_ARGS__             \
  }                       \
  namespace avx2 {        \
  __VA_ARGS__             \
  }                       \
  namespace avx512 {      \
  __VA_ARGS__             \
  }
#define DDPP_SELECT(isa, ...)                                 \
  ((isa) == ::ddpp::Isa::avx512 ? ::ddpp::avx512::__VA_ARGS__ \
   : (isa) == ::ddpp::Isa::avx2 ? ::ddpp::avx2::__VA_ARGS__   \
                                : ::ddpp::base::__VA_ARGS__)
#else
#define DDPP_PER_ISA(...) \
  namespace base {        \
  __VA_ARGS__             \
  }
#define DDPP_SELECT(isa, ...) ((void)(isa), ::ddpp::base::__VA_ARGS__)
#endif
