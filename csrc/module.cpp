// The Python module recgrela_ext._C: facts fixed when the library was built. The operators are in
// librecgrela.so and reach Python through the dispatcher; nothing here depends on torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

py::dict build_info() {
  const std::string toolkit = RECGRELA_CUDA_TOOLKIT;
  py::dict facts;
  facts["version"] = RECGRELA_VERSION;
  facts["torch_built"] = RECGRELA_TORCH_BUILT;
  facts["cuda_toolkit"] = toolkit.empty() ? py::object(py::none()) : py::object(py::str(toolkit));
  facts["cuda_archs"] = split(RECGRELA_CUDA_ARCHS, ';');
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build facts of recgrela_ext.";
  module.def("build_info", &build_info,
             "Version, torch and CUDA toolkit (None without one) the library was built with.");
}
