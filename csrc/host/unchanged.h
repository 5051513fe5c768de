// Whether Python objects are as they were: questions that a frozen model puts to hundreds of dictionaries and tensors
// before each call (mobilenet_ext/plans.py).
//
// The weights have pushed these objects out of the cache since the last call. In a loop without Python's interpreter
// in it the processor fetches several of them at once.
#pragma once

#include <pybind11/pybind11.h>

namespace mx::host {

// Whether each of the dictionaries `counted` has as many entries as `counts` says, and the values of all those in
// `held`, one after the other, are the objects in `values`.
bool dicts_are(const pybind11::tuple& counted, const pybind11::tuple& counts, const pybind11::tuple& held,
               const pybind11::tuple& values);

// Whether `attribute` (a descriptor of the tensors' class) and `method` of each tensor are what `answers` holds, in
// turn of one tensor after the other.
bool tensors_answer(const pybind11::tuple& tensors, const pybind11::object& attribute, const pybind11::object& method,
                    const pybind11::tuple& answers);

}  // namespace mx::host
