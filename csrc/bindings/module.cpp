// ddpp._info: what was built and which instruction sets run here. Does not know torch.
#include <pybind11/pybind11.h>

#include "kernels/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_info, m) {
  m.doc() = "Facts about ddpp's compiled libraries.";
  m.def("build", [] {
    py::dict facts;
    facts["compiler"] = DDPP_COMPILER;
    facts["build_type"] = DDPP_BUILD_TYPE;
    facts["torch_headers"] = DDPP_TORCH_HEADERS;
    facts["cuda"] = DDPP_CUDA_VERSION;
    facts["cuda_archs"] = DDPP_CUDA_ARCHS;
    return facts;
  });
  m.def("active_isa", [] { return ddpp::isa_name(ddpp::active_isa()); });
  m.def("supported_isas", [] {
    py::list names;
    for (const ddpp::Isa isa : {ddpp::Isa::base, ddpp::Isa::avx2, ddpp::Isa::avx512})
      if (ddpp::isa_runs_here(isa)) names.append(ddpp::isa_name(isa));
    return names;
  });
}
