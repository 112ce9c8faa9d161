// Whether Python objects are what they were: in one call what would take the interpreter a hundred look-ups.
#pragma once

#include <pybind11/pybind11.h>

namespace gcnet_ext {

namespace py = pybind11;

// Calls body(items...) for every `count` items of a flat tuple; false as soon as body says so.
template <int count, typename Body>
bool all_of(const py::tuple& flat, const Body& body) {
  for (py::ssize_t i = 0; i + count <= PyTuple_GET_SIZE(flat.ptr()); i += count) {
    const bool holds = [&]<int... j>(std::integer_sequence<int, j...>) {
      return body(PyTuple_GET_ITEM(flat.ptr(), i + j)...);
    }(std::make_integer_sequence<int, count>{});
    if (!holds) return false;
  }
  return true;
}

// dictionary[name], or null if it has none.
inline PyObject* look_up(PyObject* dictionary, PyObject* name) {
  PyObject* found = PyDict_GetItemWithError(dictionary, name);
  if (!found && PyErr_Occurred()) throw py::error_already_set();
  return found;
}

// kinds    object, type:              type(object) is type
// fields   dictionary, name, value:   dictionary[name] is value, or there is none and value is None
// sizes    dictionary, length:        len(dictionary) == length
// wanted   dictionary, name:          the result has dictionary[name]
//
// The wanted values, or None where one of these no longer holds.
inline py::object unchanged(const py::tuple& kinds, const py::tuple& fields, const py::tuple& sizes, const py::tuple& wanted) {
  const bool same =
      all_of<2>(kinds, [](PyObject* object, PyObject* type) { return py::type::handle_of(object).ptr() == type; }) &&
      all_of<3>(fields,
                [](PyObject* dictionary, PyObject* name, PyObject* value) {
                  PyObject* found = look_up(dictionary, name);
                  return found ? found == value : value == Py_None;
                }) &&
      all_of<2>(sizes, [](PyObject* dictionary, PyObject* length) {
        const py::ssize_t size = PyDict_Size(dictionary);
        if (size < 0) throw py::error_already_set();
        return size == PyLong_AsSsize_t(length);
      });
  if (!same) return py::none();
  py::list values;
  const bool found = all_of<2>(wanted, [&](PyObject* dictionary, PyObject* name) {
    PyObject* value = look_up(dictionary, name);
    if (value) values.append(py::handle(value));
    return value != nullptr;
  });
  return found ? py::object(values) : py::none();
}

}  // namespace gcnet_ext
