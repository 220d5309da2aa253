// The short way from Python to the engine, for blocking calls that were made before and for single messages: small
// ones take about two microseconds, and looking at an array through Python takes several, twenty times as many where
// a computation has just had the caches to itself.
//
// 1. What a caller passes is looked at through the C API: exactly a torch.Tensor or a numpy.ndarray, plain and
//    contiguous. Whatever is out of the ordinary is left to the long way (arrays.py), which knows what to say.
// 2. A program is found by (dtype object, numel, op object): identity is enough, others take the long way.
// 3. Short or long, each call gets a stamp of the calls before it, which rides in its messages: ranks whose calls
//    differed find out at their next message, though the call at fault had none between them.
#include <array>
#include <unordered_map>

#include "bindings.h"
#include "engine.h"
#include "signals.h"

namespace py = pybind11;

namespace hybridcomm {
namespace {

struct Key {
  const PyObject* dtype;
  const PyObject* op;
  uint64_t numel;
  bool operator==(const Key& other) const {
    return dtype == other.dtype && op == other.op && numel == other.numel;
  }
};

struct KeyHash {
  size_t operator()(const Key& key) const {
    const auto mix = [](size_t seed, size_t value) { return (seed ^ value) * 0x9E3779B97F4A7C15u; };
    return mix(mix(reinterpret_cast<size_t>(key.dtype), reinterpret_cast<size_t>(key.op)), key.numel) >> 7;
  }
};

// A new reference, or null with no error set.
py::object quiet(PyObject* found) {
  if (found == nullptr) PyErr_Clear();
  return py::reinterpret_steal<py::object>(found);
}

py::object attribute(py::handle object, const py::str& name) {
  return quiet(PyObject_GetAttr(object.ptr(), name.ptr()));
}

py::object call(py::handle object, const py::str& name) {
  PyObject* self = object.ptr();
  return quiet(PyObject_VectorcallMethod(name.ptr(), &self, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
}

class PreparedCalls {
 public:
  explicit PreparedCalls(std::shared_ptr<Engine> engine) : engine_(std::move(engine)) {}

  // `op` on an array like `like` runs `program` from now on.
  void remember(const py::object& like, const py::object& op, std::shared_ptr<Program> program) {
    if (programs_.size() >= kRemembered) programs_.clear();
    py::object dtype = like.attr("dtype");
    const bool torch = py::hasattr(like, "data_ptr");
    learn_types(torch);
    const auto numel = torch ? like.attr("numel")().cast<uint64_t>() : like.attr("size").cast<uint64_t>();
    const Key key{dtype.ptr(), op.ptr(), numel};
    programs_[key] = {std::move(dtype), op, std::move(program)};
  }

  // Runs the remembered program on `array` to its end; false: nothing was done, take the long way.
  bool run(py::handle array, py::handle op) {
    Plain plain;
    if (paused || !look_at(array, plain)) return false;
    const auto found = programs_.find({plain.dtype.ptr(), op.ptr(), plain.numel});
    if (found == programs_.end() || !note_written(array, Py_TYPE(array.ptr()))) return false;
    const std::shared_ptr<const Program> program = found->second.program;
    Buffers buffers;
    buffers.tensor = reinterpret_cast<std::byte*>(plain.address);
    buffers.name = stamp(*program, 0);
    const py::gil_scoped_release no_gil;
    engine_->run(program, buffers, raise_pending_signals);
    return true;
  }

  // Messages of arrays like this one are of this dtype.
  void remember_dtype(const py::object& like, uint8_t dtype) {
    learn_types(py::hasattr(like, "data_ptr"));
    const py::object key = like.attr("dtype");
    dtypes_[key.ptr()] = {key, dtype};
  }

  // Starts to send or receive `array`; null: nothing was done, take the long way.
  std::shared_ptr<Work> post(bool send, py::handle array, int peer, uint64_t group, uint32_t tag) {
    Plain plain;
    if (!look_at(array, plain)) return nullptr;
    const auto found = dtypes_.find(plain.dtype.ptr());
    if (found == dtypes_.end() || (!send && !note_written(array, Py_TYPE(array.ptr())))) return nullptr;
    const uint8_t dtype = found->second.second;
    std::vector<Message> messages{message_of(send, peer, group, tag, dtype, plain.numel, plain.address)};
    const py::gil_scoped_release no_gil;
    return engine_->post(std::move(messages));
  }

  bool paused = false;  // calls are collected, not run

  // The name that a call of `program` on the tensor `name` goes by, which tells the calls before it as well.
  uint32_t stamp(const Program& program, uint32_t name) {
    uint64_t& history = engine_->history(program.group);
    const uint32_t stamped = static_cast<uint32_t>(history >> 32) ^ name;
    history = (history ^ program.tag.digest ^ name) * 0x9E3779B97F4A7C15u;
    return stamped;
  }

 private:
  static constexpr size_t kRemembered = 256;
  struct Plain {
    py::object dtype;
    uint64_t numel = 0;
    size_t address = 0;
  };
  struct Entry {
    py::object dtype, op;  // kept alive, so that their addresses stay theirs
    std::shared_ptr<const Program> program;
  };

  void learn_types(bool torch) {
    if (torch && !tensor_type_) {
      tensor_type_ = py::module_::import("torch").attr("Tensor");
      increment_version_ = py::module_::import("torch.autograd.graph").attr("increment_version");
    }
    if (!torch && !array_type_) array_type_ = py::module_::import("numpy").attr("ndarray");
  }

  bool look_at(py::handle array, Plain& plain) const {
    const PyTypeObject* type = Py_TYPE(array.ptr());
    if (tensor_type_ && type == reinterpret_cast<PyTypeObject*>(tensor_type_.ptr())) {
      return look_at_tensor(array, plain);
    }
    return array_type_ && type == reinterpret_cast<PyTypeObject*>(array_type_.ptr()) &&
           look_at_array(array, plain);
  }

  bool look_at_tensor(py::handle tensor, Plain& plain) const {
    if (attribute(tensor, is_cpu_).ptr() != Py_True || attribute(tensor, requires_grad_).ptr() != Py_False ||
        call(tensor, is_contiguous_).ptr() != Py_True || call(tensor, is_neg_).ptr() != Py_False) {
      return false;
    }
    plain.dtype = attribute(tensor, dtype_);
    const py::object numel = call(tensor, numel_), address = call(tensor, data_ptr_);
    if (!plain.dtype || !numel || !address) return false;
    plain.numel = PyLong_AsSize_t(numel.ptr());
    plain.address = PyLong_AsSize_t(address.ptr());
    if (PyErr_Occurred() == nullptr) return true;
    PyErr_Clear();
    return false;
  }

  bool look_at_array(py::handle array, Plain& plain) const {
    Py_buffer buffer;
    if (PyObject_GetBuffer(array.ptr(), &buffer, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) != 0) {
      PyErr_Clear();
      return false;
    }
    plain.address = reinterpret_cast<size_t>(buffer.buf);
    const auto itemsize = static_cast<size_t>(buffer.itemsize);
    plain.numel = itemsize == 0 ? 0 : static_cast<uint64_t>(buffer.len) / itemsize;
    PyBuffer_Release(&buffer);
    plain.dtype = attribute(array, dtype_);
    return itemsize != 0 && plain.address % itemsize == 0 && plain.dtype;
  }

  // Tells autograd; an inference tensor has nothing to tell, and refuses: the long way knows.
  bool note_written(py::handle array, const PyTypeObject* type) const {
    if (!tensor_type_ || type != reinterpret_cast<PyTypeObject*>(tensor_type_.ptr())) return true;
    return static_cast<bool>(quiet(PyObject_CallOneArg(increment_version_.ptr(), array.ptr())));
  }

  std::shared_ptr<Engine> engine_;
  std::unordered_map<Key, Entry, KeyHash> programs_;
  std::unordered_map<const PyObject*, std::pair<py::object, uint8_t>> dtypes_;
  py::object tensor_type_, array_type_, increment_version_;
  const py::str dtype_{intern("dtype")}, is_cpu_{intern("is_cpu")}, requires_grad_{intern("requires_grad")},
      is_contiguous_{intern("is_contiguous")}, is_neg_{intern("is_neg")}, numel_{intern("numel")},
      data_ptr_{intern("data_ptr")};
  static py::str intern(const char* name) {
    return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name));
  }
};

}  // namespace

void bind_prepared(py::module_& module) {
  py::class_<PreparedCalls>(module, "PreparedCalls")
      .def(py::init<std::shared_ptr<Engine>>())
      .def("remember", &PreparedCalls::remember, py::arg("like"), py::arg("op"), py::arg("program"))
      .def("run", &PreparedCalls::run, py::arg("array"), py::arg("op"))
      .def("remember_dtype", &PreparedCalls::remember_dtype, py::arg("like"), py::arg("dtype"))
      .def("post", &PreparedCalls::post, py::arg("send"), py::arg("array"), py::arg("peer"), py::arg("group"),
           py::arg("tag"))
      .def_readwrite("paused", &PreparedCalls::paused)
      .def("stamp", &PreparedCalls::stamp, py::arg("program"), py::arg("name"));
}

}  // namespace hybridcomm
