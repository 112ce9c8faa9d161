// Whether Python objects are what they were: in one call what would take the interpreter a hundred look-ups. Plain CPython, for
// the way through pybind11 takes 4 us when nothing of it is in a cache.
#pragma once

#include <Python.h>

#include <algorithm>
#include <utility>

namespace gcnet_ext {

// Calls body(items...) for every `count` items of a flat tuple; false as soon as body says so.
template <int count, typename Body>
bool all_of(PyObject* flat, const Body& body) {
  for (Py_ssize_t i = 0; i + count <= PyTuple_GET_SIZE(flat); i += count) {
    const bool holds = [&]<int... j>(std::integer_sequence<int, j...>) {
      return body(PyTuple_GET_ITEM(flat, i + j)...);
    }(std::make_integer_sequence<int, count>{});
    if (!holds) return false;
  }
  return true;
}

// unchanged(kinds, fields, sizes, wanted), of flat tuples:
//   kinds    object, type:              type(object) is type
//   fields   dictionary, name, value:   dictionary[name] is value, or there is none and value is None
//   sizes    dictionary, length:        len(dictionary) == length
//   wanted   dictionary, name:          the result has dictionary[name]
//
// The list of the wanted values, or None where one of these no longer holds.
inline PyObject* unchanged(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4 || !std::all_of(arguments, arguments + 4, [](PyObject* tuple) { return PyTuple_Check(tuple); })) {
    PyErr_SetString(PyExc_TypeError, "unchanged takes four tuples: kinds, fields, sizes, wanted");
    return nullptr;
  }
  PyObject *kinds = arguments[0], *fields = arguments[1], *sizes = arguments[2], *wanted = arguments[3];
  PyObject* values = PyList_New(0);
  const bool same =
      values &&
      all_of<2>(kinds, [](PyObject* object, PyObject* type) { return reinterpret_cast<PyObject*>(Py_TYPE(object)) == type; }) &&
      all_of<3>(fields,
                [](PyObject* dictionary, PyObject* name, PyObject* value) {
                  PyObject* found = PyDict_GetItemWithError(dictionary, name);
                  return found ? found == value : value == Py_None && !PyErr_Occurred();
                }) &&
      all_of<2>(sizes,
                [](PyObject* dictionary, PyObject* length) { return PyDict_Size(dictionary) == PyLong_AsSsize_t(length); }) &&
      all_of<2>(wanted, [&](PyObject* dictionary, PyObject* name) {
        PyObject* value = PyDict_GetItemWithError(dictionary, name);
        return value && PyList_Append(values, value) == 0;
      });
  if (same) return values;
  Py_XDECREF(values);
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

}  // namespace gcnet_ext
