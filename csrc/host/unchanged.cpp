#include "host/unchanged.h"

namespace py = pybind11;

namespace mx::host {
namespace {

PyObject* item(const py::tuple& tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple.ptr(), i); }

bool has_entries(PyObject* dict, PyObject* count) {
  return PyDict_Check(dict) && PyDict_GET_SIZE(dict) == PyLong_AsSsize_t(count);
}

// Whether the values of `dict` are those in `values` from `next` on, which moves past them.
bool has_values(PyObject* dict, const py::tuple& values, Py_ssize_t* next) {
  if (!PyDict_Check(dict)) return false;
  bool same = true;
#ifdef Py_GIL_DISABLED
  Py_BEGIN_CRITICAL_SECTION(dict);  // another thread may change it meanwhile
#endif
  PyObject* value;
  Py_ssize_t position = 0;
  while (same && PyDict_Next(dict, &position, nullptr, &value)) {
    same = *next < PyTuple_GET_SIZE(values.ptr()) && value == item(values, *next);
    ++*next;
  }
#ifdef Py_GIL_DISABLED
  Py_END_CRITICAL_SECTION();
#endif
  return same;
}

// Whether `answer`, which is given away, is what was expected. A null pointer is an exception.
bool is_answer(PyObject* answer, PyObject* expected) {
  const py::object owned = py::reinterpret_steal<py::object>(answer);
  const int same = answer == nullptr ? -1 : PyObject_RichCompareBool(answer, expected, Py_EQ);
  if (same < 0) throw py::error_already_set();
  return same == 1;
}

}  // namespace

bool dicts_are(const py::tuple& counted, const py::tuple& counts, const py::tuple& held, const py::tuple& values) {
  for (const py::tuple* dicts : {&held, &counted}) {
    for (size_t i = 0; i < dicts->size(); ++i) __builtin_prefetch(item(*dicts, i));
  }
  for (size_t i = 0; i < counted.size(); ++i) {
    if (!has_entries(item(counted, i), item(counts, i))) return false;
  }
  Py_ssize_t next = 0;
  for (size_t i = 0; i < held.size(); ++i) {
    if (!has_values(item(held, i), values, &next)) return false;
  }
  return next == PyTuple_GET_SIZE(values.ptr());
}

bool tensors_answer(const py::tuple& tensors, const py::object& attribute, const py::object& method,
                    const py::tuple& answers) {
  const descrgetfunc get = Py_TYPE(attribute.ptr())->tp_descr_get;
  if (get == nullptr) throw py::type_error("attribute: expected a descriptor");
  if (answers.size() != 2 * tensors.size()) return false;
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyObject* const tensor = item(tensors, i);
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    if (!is_answer(get(attribute.ptr(), tensor, type), item(answers, 2 * i))) return false;
    if (!is_answer(PyObject_CallOneArg(method.ptr(), tensor), item(answers, 2 * i + 1))) return false;
  }
  return true;
}

}  // namespace mx::host
