// A block uses the fused operator instead of its layers only while no layer has been replaced, hooked or reconfigured. It asks
// this in every call, by one call of `unchanged` instead of a hundred look-ups in Python. The function uses the C API: a call
// through pybind11 takes 4 us when nothing of it is in a cache.
#pragma once

#include <Python.h>

#include <algorithm>
#include <utility>

namespace gcnet_ext {

// Calls body(items...) for every `count` items of a flat tuple, and stops with false as soon as body returns false.
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

// A number that changes whenever an attribute of the class or of one of its bases does; 0 if CPython has run out of them.
inline unsigned long version_of(PyTypeObject* type) {
#if PY_VERSION_HEX < 0x030C0000
  if (!PyType_HasFeature(type, Py_TPFLAGS_VALID_VERSION_TAG)) return 0;
#endif
  return type->tp_version_tag;
}

inline PyObject* class_version(PyObject*, PyObject* object) {
  if (!PyType_Check(object)) {
    PyErr_SetString(PyExc_TypeError, "class_version takes a class");
    return nullptr;
  }
  // A look-up that CPython keeps in its cache gives the class a version.
  PyObject* found = PyObject_GetAttrString(object, "__init__");
  if (!found) return nullptr;
  Py_DECREF(found);
  return PyLong_FromUnsignedLong(version_of(reinterpret_cast<PyTypeObject*>(object)));
}

// Whether the dictionary holds these keys and values, the same objects, in this order, and nothing else.
inline bool holds_just(PyObject* dictionary, PyObject* items) {
  if (!PyDict_CheckExact(dictionary) || !PyTuple_Check(items) || 2 * PyDict_GET_SIZE(dictionary) != PyTuple_GET_SIZE(items)) {
    return false;
  }
  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (Py_ssize_t i = 0; PyDict_Next(dictionary, &position, &key, &value); i += 2) {
    if (key != PyTuple_GET_ITEM(items, i) || value != PyTuple_GET_ITEM(items, i + 1)) return false;
  }
  return true;
}

inline bool is_one_of(PyTypeObject* type, PyObject* classes) {
  return !all_of<1>(classes, [&](PyObject* one) { return one != reinterpret_cast<PyObject*>(type); });
}

// The list of dictionary[name] for each pair of a flat tuple. It is null if one of them is missing or of none of the classes,
// with or without an exception.
inline PyObject* values_of(PyObject* flat, PyObject* classes) {
  if (!PyTuple_Check(flat)) {
    PyErr_SetString(PyExc_TypeError, "unchanged takes a tuple of tuples as wanted");
    return nullptr;
  }
  PyObject* values = PyList_New(0);
  const bool all = values && all_of<2>(flat, [&](PyObject* dictionary, PyObject* name) {
                     PyObject* value = PyDict_GetItemWithError(dictionary, name);
                     return value && is_one_of(Py_TYPE(value), classes) && PyList_Append(values, value) == 0;
                   });
  if (all) return values;
  Py_XDECREF(values);
  return nullptr;
}

// unchanged(kinds, fields, sizes, children, wanted, classes). All are flat tuples but wanted, which is a tuple of flat tuples:
//   kinds      object, class, version:    type(object) is class, and class_version(class) == version
//   fields     dictionary, name, value:   dictionary[name] is value, or there is none and value is None
//   sizes      dictionary, length:        len(dictionary) == length
//   children   dictionary, items:         the dictionary has these names and values, in this order, and no others
//   wanted     dictionary, name:          the result has dictionary[name]
//   classes    class:                     the type of each dictionary[name] is one of them, and no subclass
//
// It returns a list of values for each tuple in wanted, or None if one of these conditions no longer holds.
inline PyObject* unchanged(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 6 || !std::all_of(arguments, arguments + 6, [](PyObject* tuple) { return PyTuple_Check(tuple); })) {
    PyErr_SetString(PyExc_TypeError, "unchanged takes six tuples: kinds, fields, sizes, children, wanted, classes");
    return nullptr;
  }
  PyObject *kinds = arguments[0], *fields = arguments[1], *sizes = arguments[2], *children = arguments[3];
  PyObject *wanted = arguments[4], *classes = arguments[5];
  PyObject* lists = PyList_New(0);
  const bool same = lists &&
                    all_of<3>(kinds,
                              [](PyObject* object, PyObject* type, PyObject* version) {
                                const unsigned long now = version_of(Py_TYPE(object));
                                return reinterpret_cast<PyObject*>(Py_TYPE(object)) == type && now != 0 &&
                                       now == PyLong_AsUnsignedLong(version);
                              }) &&
                    all_of<3>(fields,
                              [](PyObject* dictionary, PyObject* name, PyObject* value) {
                                PyObject* found = PyDict_GetItemWithError(dictionary, name);
                                return found ? found == value : value == Py_None && !PyErr_Occurred();
                              }) &&
                    all_of<2>(sizes, [](PyObject* dictionary,
                                        PyObject* length) { return PyDict_Size(dictionary) == PyLong_AsSsize_t(length); }) &&
                    all_of<2>(children, holds_just) && all_of<1>(wanted, [&](PyObject* flat) {
                      PyObject* values = values_of(flat, classes);
                      const bool kept = values && PyList_Append(lists, values) == 0;
                      Py_XDECREF(values);
                      return kept;
                    });
  if (same) return lists;
  Py_XDECREF(lists);
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

}  // namespace gcnet_ext
