// A C++ program, no Python in it, that loads librecgrela.so and calls an operator.
// Usage: test_load path/to/librecgrela.so
#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <cstdio>

int main(int argc, char** argv) {
  if (argc != 2) return std::fprintf(stderr, "usage: %s librecgrela.so\n", argv[0]), 2;
  if (dlopen(argv[1], RTLD_NOW) == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  std::vector<c10::OperatorName> names;
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames())
    if (name.name.rfind("recgrela::", 0) == 0) names.push_back(name);
  std::printf("%zu operators\n", names.size());
  return names.empty();
}
