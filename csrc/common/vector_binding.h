// A Vector comes from Python as (address, dtype code).
#pragma once

#include <pybind11/pybind11.h>

#include "vector.h"

namespace pybind11::detail {

template <>
struct type_caster<rftcore::Vector> {
  PYBIND11_TYPE_CASTER(rftcore::Vector, const_name("tuple[int, int]"));

  bool load(handle source, bool) {
    if (!isinstance<tuple>(source) || len(source) != 2) return false;
    const auto pair = reinterpret_borrow<tuple>(source);
    value = {reinterpret_cast<void*>(pair[0].cast<uintptr_t>()), pair[1].cast<int>()};
    return true;
  }
};

}  // namespace pybind11::detail
