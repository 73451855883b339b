# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule of ggml and of ik_llama.cpp, called through their shared libraries, for bench/peers.py.

Neither is a dependency of gdn: build one beside it and name the folder of its libraries.

    git clone https://github.com/ggml-org/ggml && cmake -S ggml -B ggml/build -DBUILD_SHARED_LIBS=ON \\
        -DCMAKE_BUILD_TYPE=Release && cmake --build ggml/build -j --target ggml
    git clone https://github.com/ikawrakow/ik_llama.cpp && cmake -S ik_llama.cpp -B ik_llama.cpp/build \\
        -DBUILD_SHARED_LIBS=ON -DCMAKE_BUILD_TYPE=Release -DGGML_IQK_FLASH_ATTENTION=OFF && \\
        cmake --build ik_llama.cpp/build -j --target ggml
    python bench/peers.py --ggml ggml/build --ik ik_llama.cpp/build

Both run a graph of the one operation on tensors of their own, which start at pages (what suits their loads best), and
on OpenMP's threads, which in one process are those of torch. Inputs are given in their layouts, normed before; the
outputs are compared with gdn's before anything is timed.
"""

import ctypes
import os
import pathlib

import torch

PAGE = 4096
F32 = 0  # GGML_TYPE_F32


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def _open(folder):
    """The libraries of a build folder, those that others need first, visible to one another alone."""
    names = ("libggml-base.so", "libggml-cpu.so", "libggml.so")
    found = [path for name in names for path in sorted(pathlib.Path(folder).rglob(name))]
    if not found:
        raise SystemExit(f"peers.py: no libggml*.so in {folder}; bench/native_peers.py says how to build them")
    # Lazily: without its flash attention ik_llama.cpp leaves a function undefined that is not called here.
    return [ctypes.CDLL(str(path), mode=os.RTLD_LAZY | os.RTLD_LOCAL) for path in found]


class _Ggml:
    """The functions of ggml's C interface that are needed; all handles are opaque pointers."""

    def __init__(self, folder):
        self._libraries = _open(folder)
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        long = ctypes.c_int64
        self.init = self._function("ggml_init", pointer, _InitParams)
        self.new_tensor = self._function("ggml_new_tensor", pointer, pointer, number, number, ctypes.POINTER(long))
        self.new_graph = self._function("ggml_new_graph", pointer, pointer)
        self.expand = self._function("ggml_build_forward_expand", None, pointer, pointer)
        self.nbytes = self._function("ggml_nbytes", size, pointer)
        self.wrap = self._function("ggml_backend_cpu_buffer_from_ptr", pointer, pointer, size)
        self.place = self._function("ggml_backend_tensor_alloc", None, pointer, pointer, pointer)
        self.cpu = self._function("ggml_backend_cpu_init", pointer)
        self.set_threads = self._function("ggml_backend_cpu_set_n_threads", None, pointer, number)
        self.compute = self._function("ggml_backend_graph_compute", number, pointer, pointer)

    def _function(self, name, result, *arguments):
        for library in self._libraries:
            if hasattr(library, name):
                function = getattr(library, name)
                function.restype, function.argtypes = result, list(arguments)
                return function
        raise SystemExit(f"peers.py: the library has no {name}")


class _Graph(_Ggml):
    """A graph of one operation on tensors in pages of their own."""

    def __init__(self, folder, threads):
        super().__init__(folder)
        self.context = self.init(_InitParams(1 << 22, None, True))
        self.backend = self.cpu()
        self.set_threads(self.backend, threads)
        self.kept = []

    def tensor(self, *shape):
        """A tensor of fp32 whose dimensions are given as ggml does it, the innermost first."""
        return self.new_tensor(self.context, F32, len(shape), (ctypes.c_int64 * len(shape))(*shape))

    def memory(self, tensor):
        """Gives the tensor memory; returns that as a torch tensor."""
        count = self.nbytes(tensor)
        data = torch.zeros(count + PAGE, dtype=torch.uint8)
        start = -data.data_ptr() % PAGE
        data = data[start : start + count].view(torch.float32)
        self.place(self.wrap(data.data_ptr(), count), tensor, data.data_ptr())
        self.kept.append(data)
        return data

    def ready(self, result):
        """The function that computes `result`, and its memory."""
        out = self.memory(result)
        graph = self.new_graph(self.context)
        self.expand(graph, result)

        def run():
            if self.compute(self.backend, graph) != 0:
                raise SystemExit("peers.py: the peer failed to compute")
            return out

        return run


def ggml_delta_rule(folder, threads, q, k, v, g, beta):
    """A function that returns o [1,T,H,V] by ggml's GGML_OP_GATED_DELTA_NET; all inputs [1,T,H,..], q and k normed."""
    _, T, H, K = q.shape
    graph = _Graph(folder, threads)
    make = graph._function("ggml_gated_delta_net", ctypes.c_void_p, *[ctypes.c_void_p] * 7, ctypes.c_int64)
    tensors = [graph.tensor(K, H, T, 1) for _ in range(3)] + [graph.tensor(1, H, T, 1) for _ in range(2)]
    state = graph.tensor(K, K, H, 1)
    for tensor, value in zip(tensors, (q, k, v, g, beta)):
        graph.memory(tensor).copy_(value.reshape(-1))
    graph.memory(state)
    run = graph.ready(make(graph.context, *tensors, state, 1))
    return lambda: run()[: q.numel()].view(q.shape)


def ik_delta_rule(folder, threads, q, k, v, g, beta):
    """The same by ik_llama.cpp's GGML_OP_DELTA_NET, which takes heads before tokens and the logit of beta."""
    _, T, H, K = q.shape
    graph = _Graph(folder, threads)
    make = graph._function("ggml_delta_net", ctypes.c_void_p, *[ctypes.c_void_p] * 8)
    tensors = [graph.tensor(K, T, H, 1) for _ in range(3)] + [graph.tensor(T, 1, H, 1), graph.tensor(1, T, H, 1)]
    state = graph.tensor(K, K * H, 1, 1)
    values = [x.transpose(1, 2) for x in (q, k, v)] + [g, torch.logit(beta)]  # gates: tokens before heads all the same
    for tensor, value in zip(tensors, values):
        graph.memory(tensor).copy_(value.reshape(-1))
    graph.memory(state)
    run = graph.ready(make(graph.context, *tensors, state, None))
    return lambda: run()[: q.numel()].view(q.shape)
