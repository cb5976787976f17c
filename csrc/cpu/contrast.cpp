// native_nt_xent_fwd, native_nt_xent_bwd, native_info_nce_fwd, native_info_nce_bwd, and the same with kept products:
// native_nt_xent_kept_fwd, native_nt_xent_kept_bwd, native_info_nce_kept_fwd, native_info_nce_kept_bwd.
#include "cpu/contrast.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/isa.h"
#include "cpu/library_product.h"
#include "cpu/operands.h"
#include "cpu/parallel.h"

namespace anomem::cpu {
namespace {

// −(share / tau) Σ tau_terms, 0-dim; an empty tensor for a constant temperature. Summed in double, in order.
Tensor temperature_gradient(const OptionalTensor& temperature, const Tensor& tau_terms, double tau, double share) {
  const ScalarType type = tau_terms.scalar_type();
  if (!temperature) return empty({0}, type);
  const int64_t count = tau_terms.numel();
  double sum = 0;
  if (type == ScalarType::Double) {
    const double* values = tau_terms.const_data_ptr<double>();
    for (int64_t i = 0; i < count; ++i) sum += values[i];
  } else {
    const float* values = tau_terms.const_data_ptr<float>();
    for (int64_t i = 0; i < count; ++i) sum += values[i];
  }
  return scalar(-share / tau * sum, type);
}

Rows rows_of(const Tensor& tensor, const char* argument) {
  check_shape(tensor, argument, {"G", "R", "d"});
  check_unit_stride(tensor, argument);
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

// An index [R] of columns.
void check_column_index(const Tensor& index, const char* argument, const Tensor& like, int64_t rows, int64_t columns) {
  check_operand(index, argument, like, ScalarType::Long, {rows});
  check_indices(index, argument, columns);
}

int64_t tiles_of(int64_t rows, int64_t groups) {
  const int64_t tile = tile_rows(rows, groups);
  return (rows + tile - 1) / tile;
}

// Items of a group of NT-Xent that run at once.
int64_t nt_xent_items(int64_t rows, int64_t groups) {
  const int64_t strip = strip_rows(rows, groups);
  return (strip > 0 ? (rows + strip - 1) / strip : tiles_of(rows, groups)) / 2;
}

int64_t wave_of(int64_t groups, int64_t items_per_group) {
  return groups_in_a_wave(groups, items_per_group > 0 ? items_per_group : 1, thread_count());
}

// The products of so many tiles, to be kept.
Tensor products_of(int64_t kept, int64_t tiles, int64_t elements, ScalarType sums) {
  if (kept < 0 || kept > tiles)
    refuse("kept", "0 to " + std::to_string(tiles) + ", the tiles of all groups", std::to_string(kept));
  return empty_result(kept, elements, sums);
}

// The two sets of rows of a contrast, [G, R, d] and [G, C, d], checked.
struct Sides {
  Rows rows[2];
  Type type;
  ScalarType elements, sums;
  int64_t groups, count[2], features;

  Sides(const Tensor& first, const char* first_name, const Tensor& second, const char* second_name)
      : rows{rows_of(first, first_name), rows_of(second, second_name)},
        type(type_of(first, first_name)),
        elements(first.scalar_type()),
        sums(accumulator(type)),
        groups(first.size(0)),
        count{first.size(1), second.size(1)},
        features(first.size(2)) {
    check_device(second, second_name, first);
    check_type(second, second_name, elements);
    check_shape(second, second_name, {groups, "R", features});
  }

  // One number of every row, from the forward pass or of its gradient.
  void check_per_row(const Tensor& tensor, const char* argument, const Tensor& like, int64_t rows) const {
    check_operand(tensor, argument, like, sums, {groups, rows});
  }
  // A forward pass kept them; none if it did not.
  KeptProducts<const void> kept_products(const OptionalTensor& products, const Tensor& like, int64_t tiles,
                                         int64_t elements) const {
    if (!products) return {0, nullptr};
    check_operand(*products, "products", like, sums, {"kept", elements});
    if (products->size(0) > tiles)
      refuse("products", "at most " + std::to_string(tiles) + ", the tiles of all groups",
             std::to_string(products->size(0)));
    return {products->size(0), products->const_data_ptr()};
  }
  Tensor per_row(int64_t rows) const { return empty({groups, rows}, sums); }
  Tensor gradient(int side) const { return empty({groups, count[side], features}, elements); }
};

Sides views_of(const Tensor& z, const Tensor& z_pair, const OptionalTensor& temperature) {
  const Sides views(z, "z", z_pair, "z_pair");
  check_shape(z_pair, "z_pair", {views.groups, views.count[0], views.features});
  check_scalar(temperature, "temperature", z, views.sums);
  return views;
}

Sides sides_of(const Tensor& rows, const Tensor& columns, const Tensor& positive, const OptionalTensor& exclude,
               const OptionalTensor& temperature) {
  const Sides sides(rows, "rows", columns, "columns");
  check_column_index(positive, "positive", rows, sides.count[0], sides.count[1]);
  if (exclude) check_column_index(*exclude, "exclude", rows, sides.count[0], sides.count[1]);
  check_scalar(temperature, "temperature", rows, sides.sums);
  return sides;
}

struct NtXentResult {
  Tensor loss, total, inv_norm, products;
};

// Of the first `kept` tiles of all groups the products are kept.
NtXentResult nt_xent(const Tensor& z, const Tensor& z_pair, const OptionalTensor& temperature, double tau,
                     int64_t kept) {
  const Sides views = views_of(z, z_pair, temperature);
  const int64_t groups = views.groups, batch = views.count[0], rows = 2 * batch;
  const bool library = takes_library_products(views.type, rows, rows, views.features);
  Tensor loss = views.per_row(rows), total = views.per_row(rows), inv_norm = views.per_row(rows);
  const int64_t wave = wave_of(groups, nt_xent_items(rows, groups));
  Workspace workspace(wave * nt_xent_forward_workspace(rows, groups, views.features, library), views.sums);
  const int64_t tile = tile_rows(rows, groups);
  Tensor products = products_of(kept, groups * nt_xent_tiles(rows, groups), kept_elements(tile, tile), views.sums);
  run(NtXentForward{views.type,
                    library,
                    groups,
                    batch,
                    views.features,
                    value_of(temperature, tau),
                    {views.rows[0], views.rows[1]},
                    loss.mutable_data_ptr(),
                    total.mutable_data_ptr(),
                    inv_norm.mutable_data_ptr(),
                    {kept, products.mutable_data_ptr()},
                    workspace.data(),
                    wave});
  return {loss, total, inv_norm, products};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients nt_xent_gradients(const Tensor& drows, const Tensor& z, const Tensor& z_pair, const Tensor& loss,
                            const Tensor& total, const Tensor& inv_norm, const OptionalTensor& products,
                            const OptionalTensor& temperature, double tau) {
  const Sides views = views_of(z, z_pair, temperature);
  const int64_t groups = views.groups, batch = views.count[0], rows = 2 * batch;
  const bool library = takes_library_products(views.type, rows, rows, views.features);
  views.check_per_row(drows, "drows", z, rows);
  views.check_per_row(loss, "rows", z, rows);
  views.check_per_row(inv_norm, "inv_norm", z, rows);
  views.check_per_row(total, "total", z, rows);
  const double value = value_of(temperature, tau);
  Tensor dz = views.gradient(0), dz_pair = views.gradient(1), tau_terms = views.per_row(rows);
  const int64_t wave = wave_of(groups, nt_xent_items(rows, groups));
  const int64_t tile = tile_rows(rows, groups), tiles = nt_xent_tiles(rows, groups);
  const auto kept = views.kept_products(products, z, groups * tiles, kept_elements(tile, tile));
  const bool all_kept = kept.whole(groups - 1, tiles);
  Workspace workspace(wave * nt_xent_backward_workspace(rows, groups, views.features, all_kept), views.sums);
  run(NtXentBackward{views.type,
                     library,
                     groups,
                     batch,
                     views.features,
                     value,
                     {views.rows[0], views.rows[1]},
                     drows.const_data_ptr(),
                     loss.const_data_ptr(),
                     total.const_data_ptr(),
                     inv_norm.const_data_ptr(),
                     kept,
                     {dz.mutable_data_ptr(), dz_pair.mutable_data_ptr()},
                     tau_terms.mutable_data_ptr(),
                     workspace.data(),
                     wave});
  // Each similarity counts in both of its rows.
  return {dz, dz_pair, temperature_gradient(temperature, tau_terms, value, 0.5)};
}

std::tuple<Tensor, Tensor, Tensor> nt_xent_forward(const Tensor& z, const Tensor& z_pair,
                                                   const OptionalTensor& temperature, double tau) {
  NtXentResult result = nt_xent(z, z_pair, temperature, tau, 0);
  return {result.loss, result.total, result.inv_norm};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> nt_xent_kept_forward(const Tensor& z, const Tensor& z_pair,
                                                                const OptionalTensor& temperature, double tau,
                                                                int64_t kept) {
  NtXentResult result = nt_xent(z, z_pair, temperature, tau, kept);
  return {result.loss, result.total, result.inv_norm, result.products};
}

Gradients nt_xent_backward(const Tensor& drows, const Tensor& z, const Tensor& z_pair, const Tensor& loss,
                           const Tensor& total, const Tensor& inv_norm, const OptionalTensor& temperature, double tau) {
  return nt_xent_gradients(drows, z, z_pair, loss, total, inv_norm, std::nullopt, temperature, tau);
}

Gradients nt_xent_kept_backward(const Tensor& drows, const Tensor& z, const Tensor& z_pair, const Tensor& loss,
                                const Tensor& total, const Tensor& inv_norm, const Tensor& products,
                                const OptionalTensor& temperature, double tau) {
  return nt_xent_gradients(drows, z, z_pair, loss, total, inv_norm, products, temperature, tau);
}

struct InfoNceResult {
  Tensor loss, total, inv_rows, inv_columns, products;
};

// Of the first `kept` tiles of all groups the products are kept.
InfoNceResult info_nce(const Tensor& rows, const Tensor& columns, const Tensor& positive, const OptionalTensor& exclude,
                       const OptionalTensor& temperature, double tau, int64_t kept) {
  const Sides sides = sides_of(rows, columns, positive, exclude, temperature);
  const int64_t groups = sides.groups, r = sides.count[0], c = sides.count[1];
  const bool library = takes_library_products(sides.type, r, c, sides.features);
  Tensor loss = sides.per_row(r), total = sides.per_row(r), inv_rows = sides.per_row(r), inv_columns = sides.per_row(c);
  const int64_t wave = wave_of(groups, tiles_of(r, groups));
  Tensor products = products_of(kept, groups * info_nce_tiles(r, c, groups),
                                kept_elements(tile_rows(r, groups), kLargestTile), sides.sums);
  Workspace workspace(wave * info_nce_forward_workspace(r, c, sides.features, library), sides.sums);
  run(InfoNceForward{sides.type,
                     library,
                     groups,
                     {r, c},
                     sides.features,
                     value_of(temperature, tau),
                     {sides.rows[0], sides.rows[1]},
                     positive.const_data_ptr<int64_t>(),
                     optional_data<int64_t>(exclude),
                     loss.mutable_data_ptr(),
                     total.mutable_data_ptr(),
                     {inv_rows.mutable_data_ptr(), inv_columns.mutable_data_ptr()},
                     {kept, products.mutable_data_ptr()},
                     workspace.data(),
                     wave});
  return {loss, total, inv_rows, inv_columns, products};
}

Gradients info_nce_gradients(const Tensor& dloss, const Tensor& rows, const Tensor& columns, const Tensor& loss,
                             const Tensor& total, const Tensor& inv_norm_rows, const Tensor& inv_norm_columns,
                             const OptionalTensor& products, const Tensor& positive, const OptionalTensor& exclude,
                             const OptionalTensor& temperature, double tau) {
  const Sides sides = sides_of(rows, columns, positive, exclude, temperature);
  const int64_t groups = sides.groups, r = sides.count[0], c = sides.count[1];
  const bool library = takes_library_products(sides.type, r, c, sides.features);
  sides.check_per_row(dloss, "dloss", rows, r);
  sides.check_per_row(loss, "loss", rows, r);
  sides.check_per_row(total, "total", rows, r);
  sides.check_per_row(inv_norm_rows, "inv_norm_rows", rows, r);
  sides.check_per_row(inv_norm_columns, "inv_norm_columns", rows, c);
  const double value = value_of(temperature, tau);
  Tensor drows = sides.gradient(0), dcolumns = sides.gradient(1), tau_terms = sides.per_row(r);
  const int64_t wave = wave_of(groups, tiles_of(r, groups));
  const int64_t tiles = info_nce_tiles(r, c, groups);
  const auto kept =
      sides.kept_products(products, rows, groups * tiles, kept_elements(tile_rows(r, groups), kLargestTile));
  const bool all_kept = kept.whole(groups - 1, tiles);
  Workspace workspace(wave * info_nce_backward_workspace(r, c, sides.features, all_kept), sides.sums);
  run(InfoNceBackward{sides.type,
                      library,
                      groups,
                      {r, c},
                      sides.features,
                      value,
                      {sides.rows[0], sides.rows[1]},
                      dloss.const_data_ptr(),
                      loss.const_data_ptr(),
                      total.const_data_ptr(),
                      {inv_norm_rows.const_data_ptr(), inv_norm_columns.const_data_ptr()},
                      positive.const_data_ptr<int64_t>(),
                      optional_data<int64_t>(exclude),
                      kept,
                      {drows.mutable_data_ptr(), dcolumns.mutable_data_ptr()},
                      tau_terms.mutable_data_ptr(),
                      workspace.data(),
                      wave});
  return {drows, dcolumns, temperature_gradient(temperature, tau_terms, value, 1.0)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_forward(const Tensor& rows, const Tensor& columns,
                                                            const Tensor& positive, const OptionalTensor& exclude,
                                                            const OptionalTensor& temperature, double tau) {
  InfoNceResult result = info_nce(rows, columns, positive, exclude, temperature, tau, 0);
  return {result.loss, result.total, result.inv_rows, result.inv_columns};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> info_nce_kept_forward(const Tensor& rows, const Tensor& columns,
                                                                         const Tensor& positive,
                                                                         const OptionalTensor& exclude,
                                                                         const OptionalTensor& temperature, double tau,
                                                                         int64_t kept) {
  InfoNceResult result = info_nce(rows, columns, positive, exclude, temperature, tau, kept);
  return {result.loss, result.total, result.inv_rows, result.inv_columns, result.products};
}

Gradients info_nce_backward(const Tensor& dloss, const Tensor& rows, const Tensor& columns, const Tensor& loss,
                            const Tensor& total, const Tensor& inv_norm_rows, const Tensor& inv_norm_columns,
                            const Tensor& positive, const OptionalTensor& exclude, const OptionalTensor& temperature,
                            double tau) {
  return info_nce_gradients(dloss, rows, columns, loss, total, inv_norm_rows, inv_norm_columns, std::nullopt, positive,
                            exclude, temperature, tau);
}

Gradients info_nce_kept_backward(const Tensor& dloss, const Tensor& rows, const Tensor& columns, const Tensor& loss,
                                 const Tensor& total, const Tensor& inv_norm_rows, const Tensor& inv_norm_columns,
                                 const Tensor& products, const Tensor& positive, const OptionalTensor& exclude,
                                 const OptionalTensor& temperature, double tau) {
  return info_nce_gradients(dloss, rows, columns, loss, total, inv_norm_rows, inv_norm_columns, products, positive,
                            exclude, temperature, tau);
}

}  // namespace
}  // namespace anomem::cpu

STABLE_TORCH_LIBRARY_IMPL(anomem, CPU, m) {
  m.impl("native_nt_xent_fwd", TORCH_BOX(&anomem::cpu::nt_xent_forward));
  m.impl("native_nt_xent_bwd", TORCH_BOX(&anomem::cpu::nt_xent_backward));
  m.impl("native_nt_xent_kept_fwd", TORCH_BOX(&anomem::cpu::nt_xent_kept_forward));
  m.impl("native_nt_xent_kept_bwd", TORCH_BOX(&anomem::cpu::nt_xent_kept_backward));
  m.impl("native_info_nce_fwd", TORCH_BOX(&anomem::cpu::info_nce_forward));
  m.impl("native_info_nce_bwd", TORCH_BOX(&anomem::cpu::info_nce_backward));
  m.impl("native_info_nce_kept_fwd", TORCH_BOX(&anomem::cpu::info_nce_kept_forward));
  m.impl("native_info_nce_kept_bwd", TORCH_BOX(&anomem::cpu::info_nce_kept_backward));
}
