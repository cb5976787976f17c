// NT-Xent and InfoNCE on CPU tensors: checks, allocation, and the call of the kernels.
#include "cpu/contrast.h"

#include <tuple>

#include "checks.h"
#include "cpu/operators.h"
#include "cpu/parallel.h"
#include "cpu/tournament.h"

namespace anomem {
namespace {

using OptionalTensor = std::optional<Tensor>;

double temperature_of(const OptionalTensor& temperature, double tau) {
  return temperature.has_value() ? scalar_value(*temperature, "temperature") : tau;
}

// −(share / tau) Σ along, 0-dim, or an empty tensor where the temperature is a constant. Summed in double, in order.
Tensor temperature_gradient(const OptionalTensor& temperature, const Tensor& along, double tau, double share) {
  const ScalarType type = along.scalar_type();
  if (!temperature.has_value()) return empty({0}, type);
  Tensor result = empty({}, type);
  double sum = 0;
  const int64_t count = along.numel();
  if (type == ScalarType::Double) {
    const double* values = along.const_data_ptr<double>();
    for (int64_t i = 0; i < count; ++i) sum += values[i];
    *result.mutable_data_ptr<double>() = -share / tau * sum;
  } else {
    const float* values = along.const_data_ptr<float>();
    for (int64_t i = 0; i < count; ++i) sum += values[i];
    *result.mutable_data_ptr<float>() = float(-share / tau * sum);
  }
  return result;
}

cpu::Rows rows_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 3, name, ": expected three axes");
  STD_TORCH_CHECK(tensor.stride(2) == 1 || tensor.size(2) <= 1 || tensor.numel() == 0, name,
                  ": expected rows of unit stride");
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

// Kernels read [R] indices without a check of their own, so a value outside would read foreign memory.
void check_index(const Tensor& index, const char* name, int64_t rows, int64_t columns) {
  check_type(index, name, ScalarType::Long);
  check_shape(index, name, {rows});
  check_contiguous(index, name);
  const int64_t* values = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows; ++i)
    STD_TORCH_CHECK(values[i] >= 0 && values[i] < columns, name, ": index out of range");
}

int64_t tiles_of(int64_t rows, int64_t groups) {
  const int64_t tile = cpu::tile_rows(rows, groups);
  return (rows + tile - 1) / tile;
}

int64_t wave_of(int64_t groups, int64_t items_per_group) {
  return cpu::groups_in_a_wave(groups, items_per_group > 0 ? items_per_group : 1, cpu::thread_count());
}

// The sums of one row each, as the backward gets them.
void check_per_row(const Tensor& tensor, const char* name, ScalarType type, int64_t groups, int64_t rows) {
  check_type(tensor, name, type);
  check_shape(tensor, name, {groups, rows});
  check_contiguous(tensor, name);
}

// Two sets of rows, [G, R, d] and [G, C, d], with what every contrast checks and allocates for them.
struct Sides {
  cpu::Rows rows[2];
  cpu::Type type;
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
    check_shape(second, second_name, {groups, count[1], features});
    check_type(second, second_name, elements);
  }

  Tensor per_row(int64_t rows) const { return empty({groups, rows}, sums); }
  Tensor gradient(int side) const { return empty({groups, count[side], features}, elements); }
};

Sides views_of(const Tensor& z, const Tensor& z_pair) {
  const Sides views(z, "z", z_pair, "z_pair");
  STD_TORCH_CHECK(views.count[0] == views.count[1], "z_pair: expected as many rows as in z");
  return views;
}

std::tuple<Tensor, Tensor, Tensor> nt_xent_forward(const Tensor& z, const Tensor& z_pair,
                                                   const OptionalTensor& temperature, double tau) {
  const Sides views = views_of(z, z_pair);
  const int64_t groups = views.groups, batch = views.count[0], rows = 2 * batch;
  Tensor loss = views.per_row(rows), total = views.per_row(rows), inv_norm = views.per_row(rows);
  const int64_t wave = wave_of(groups, tiles_of(rows, groups) / 2);
  Tensor workspace = empty({wave, cpu::nt_xent_forward_workspace(rows, views.features)}, views.sums);
  cpu::nt_xent_forward({views.type, groups, batch, views.features, temperature_of(temperature, tau),
                        {views.rows[0], views.rows[1]}, loss.mutable_data_ptr(), total.mutable_data_ptr(),
                        inv_norm.mutable_data_ptr(), workspace.mutable_data_ptr(), wave});
  return {loss, total, inv_norm};
}

std::tuple<Tensor, Tensor, Tensor> nt_xent_backward(const Tensor& dloss, const Tensor& z, const Tensor& z_pair,
                                                    const Tensor& inv_norm, const Tensor& total,
                                                    const OptionalTensor& temperature, double tau) {
  const Sides views = views_of(z, z_pair);
  const int64_t groups = views.groups, batch = views.count[0], rows = 2 * batch;
  check_per_row(dloss, "drows", views.sums, groups, rows);
  check_per_row(inv_norm, "inv_norm", views.sums, groups, rows);
  check_per_row(total, "total", views.sums, groups, rows);
  const double value = temperature_of(temperature, tau);
  Tensor dz = views.gradient(0), dz_pair = views.gradient(1), along = views.per_row(rows);
  const int64_t wave = wave_of(groups, tiles_of(rows, groups) / 2);
  Tensor workspace = empty({wave, cpu::nt_xent_backward_workspace(rows, views.features)}, views.sums);
  cpu::nt_xent_backward({views.type, groups, batch, views.features, value, {views.rows[0], views.rows[1]},
                         dloss.const_data_ptr(), total.const_data_ptr(), inv_norm.const_data_ptr(),
                         {dz.mutable_data_ptr(), dz_pair.mutable_data_ptr()}, along.mutable_data_ptr(),
                         workspace.mutable_data_ptr(), wave});
  // Each similarity counts in both of its rows.
  return {dz, dz_pair, temperature_gradient(temperature, along, value, 0.5)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_forward(const Tensor& rows, const Tensor& columns,
                                                            const Tensor& positive, const OptionalTensor& exclude,
                                                            const OptionalTensor& temperature, double tau) {
  const Sides sides(rows, "rows", columns, "columns");
  const int64_t groups = sides.groups, r = sides.count[0], c = sides.count[1];
  check_index(positive, "positive", r, c);
  if (exclude.has_value()) check_index(*exclude, "exclude", r, c);
  Tensor loss = sides.per_row(r), total = sides.per_row(r), inv_rows = sides.per_row(r), inv_columns = sides.per_row(c);
  const int64_t wave = wave_of(groups, tiles_of(r, groups));
  Tensor workspace = empty({wave, cpu::info_nce_forward_workspace(r, c, sides.features)}, sides.sums);
  cpu::info_nce_forward({sides.type, groups, {r, c}, sides.features, temperature_of(temperature, tau),
                         {sides.rows[0], sides.rows[1]}, positive.const_data_ptr<int64_t>(),
                         exclude.has_value() ? exclude->const_data_ptr<int64_t>() : nullptr,
                         loss.mutable_data_ptr(), total.mutable_data_ptr(),
                         {inv_rows.mutable_data_ptr(), inv_columns.mutable_data_ptr()},
                         workspace.mutable_data_ptr(), wave});
  return {loss, total, inv_rows, inv_columns};
}

std::tuple<Tensor, Tensor, Tensor> info_nce_backward(const Tensor& dloss, const Tensor& rows, const Tensor& columns,
                                                     const Tensor& inv_norm_rows, const Tensor& inv_norm_columns,
                                                     const Tensor& total, const Tensor& positive,
                                                     const OptionalTensor& exclude, const OptionalTensor& temperature,
                                                     double tau) {
  const Sides sides(rows, "rows", columns, "columns");
  const int64_t groups = sides.groups, r = sides.count[0], c = sides.count[1];
  check_per_row(dloss, "dloss", sides.sums, groups, r);
  check_per_row(total, "total", sides.sums, groups, r);
  check_per_row(inv_norm_rows, "inv_norm_rows", sides.sums, groups, r);
  check_per_row(inv_norm_columns, "inv_norm_columns", sides.sums, groups, c);
  check_index(positive, "positive", r, c);
  if (exclude.has_value()) check_index(*exclude, "exclude", r, c);
  const double value = temperature_of(temperature, tau);
  Tensor drows = sides.gradient(0), dcolumns = sides.gradient(1), along = sides.per_row(r);
  const int64_t wave = wave_of(groups, tiles_of(r, groups));
  Tensor workspace = empty({wave, cpu::info_nce_backward_workspace(r, c, sides.features)}, sides.sums);
  cpu::info_nce_backward({sides.type, groups, {r, c}, sides.features, value, {sides.rows[0], sides.rows[1]},
                          dloss.const_data_ptr(), total.const_data_ptr(),
                          {inv_norm_rows.const_data_ptr(), inv_norm_columns.const_data_ptr()},
                          positive.const_data_ptr<int64_t>(),
                          exclude.has_value() ? exclude->const_data_ptr<int64_t>() : nullptr,
                          {drows.mutable_data_ptr(), dcolumns.mutable_data_ptr()}, along.mutable_data_ptr(),
                          workspace.mutable_data_ptr(), wave});
  return {drows, dcolumns, temperature_gradient(temperature, along, value, 1.0)};
}

}  // namespace

void register_contrast(torch::stable::detail::StableLibrary& library) {
  library.impl("native_nt_xent_fwd", TORCH_BOX(&nt_xent_forward));
  library.impl("native_nt_xent_bwd", TORCH_BOX(&nt_xent_backward));
  library.impl("native_info_nce_fwd", TORCH_BOX(&info_nce_forward));
  library.impl("native_info_nce_bwd", TORCH_BOX(&info_nce_backward));
}

}  // namespace anomem
