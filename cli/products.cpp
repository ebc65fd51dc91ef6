#include "cli/products.h"

#include "kernels/cpu/cpu_backend.h"

namespace kvlapse::cli {

void add_products_option(CLI::App& command, std::string& products) {
  command
      .add_option("--products", products,
                  "with quantised weights: exact (fp32), or int16 (activations in 16-bit integers)")
      ->check(CLI::IsMember({"exact", "int16"}))
      ->capture_default_str();
}

MatmulMode products_of(const std::string& products, const Model& model) {
  return products == "int16" && has_integer_products(model.weights.transformer) ? MatmulMode::int16
                                                                                : MatmulMode::exact;
}

const char* products_name(MatmulMode mode) {
  return mode == MatmulMode::int16 ? "int16" : "exact";
}

}  // namespace kvlapse::cli
