#include "kernels/choice/gpu.h"

#include "core/base/error.h"
#include "kernels/cpu/cpu_backend.h"

namespace kvlapse {

int parse_device(const std::string& text) {
  if (text == "cpu") return -1;
  if (text == "cuda") return 0;
  const std::string digits = text.starts_with("cuda:") ? text.substr(5) : "";
  if (digits.empty() || digits.size() > 3 || digits.find_first_not_of("0123456789") != std::string::npos)
    fail_usage("--device: expected cpu, cuda or cuda:N, found '{}'", text);
  return std::stoi(digits);
}

std::unique_ptr<Backend> make_backend(const std::string& device, int n_threads, MatmulMode mode) {
  const int index = parse_device(device);
  return index < 0 ? make_cpu_backend(n_threads, mode) : make_cuda_backend(index);
}

}  // namespace kvlapse
