"""The system calls of torch's and transformers' savers and loaders, as traced, without torch."""

import ctypes
import mmap
import os

MIB4 = 4 << 20


def blob(length, seed):
    return bytes((index * 31 + seed) % 251 for index in range(4096)) * (length // 4096)


def write_all(descriptor, buffers):
    assert os.writev(descriptor, buffers) == sum(len(buffer) for buffer in buffers)


def test_torch_save_and_load(saved):
    path = saved.folder / "model.pt"
    parts = [blob(MIB4, seed) for seed in range(4)]
    tail = os.urandom(1111)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    write_all(descriptor, [b"h" * 832, parts[0]])
    for part in parts[1:]:
        write_all(descriptor, [b"r" * 64, part])
    os.write(descriptor, tail)
    os.close(descriptor)
    saved.check("model.pt")

    descriptor = os.open(path, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    assert os.pread(descriptor, 4096, 0)[:832] == b"h" * 832
    assert os.pread(descriptor, 4096, size - 4096).endswith(tail)
    for distance in (22, 42, 98):
        assert os.pread(descriptor, 22, size - distance) == (tail)[len(tail) - distance:][:22]
    assert os.pread(descriptor, MIB4, 832) == parts[0]
    # torch.load(mmap=True)
    mapped = mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE,
                       prot=mmap.PROT_READ | mmap.PROT_WRITE)
    mapped.madvise(mmap.MADV_SEQUENTIAL)
    os.close(descriptor)
    at = 832
    for part in parts:
        assert mapped[at:at + MIB4] == part
        at += MIB4 + 64
    mapped[0] = 1
    mapped.close()


def test_save_pretrained_in_shards(saved):
    folder = saved.folder / "model"
    folder.mkdir()
    names = []
    for shard in range(3):
        data = [b"{}" * 202] + [blob(MIB4, shard + seed) for seed in range(4)]
        temporary = folder / f".tmp{shard}AbCdE"
        final = folder / f"model-{shard + 1:05}-of-00003.safetensors"
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(descriptor, sum(map(len, data)))
        for part in data:
            assert os.write(descriptor, part) == len(part)
        os.rename(temporary, final)
        assert final.name not in " ".join(saved.names())
        os.close(descriptor)
        names.append(f"model/{final.name}")
        assert saved.names()[-1] == names[-1]
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        (folder / name).write_text("{}")
        names.append(f"model/{name}")
    saved.check(*names)

    # safetensors' loader: map twice, close, then fault the data in.
    path = folder / "model-00002-of-00003.safetensors"
    descriptor = os.open(path, os.O_RDONLY)
    maps = [mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
            for _ in range(2)]
    os.close(descriptor)
    for index in range(4):
        start = 404 + index * MIB4
        assert maps[1][start:start + MIB4] == blob(MIB4, 1 + index)
    for mapped in maps:
        mapped.close()


def test_large_memcpy_faults_backwards(saved):
    data = os.urandom(1 << 20) * 24
    (saved.folder / "f").write_bytes(data)
    saved.check("f")
    descriptor = os.open(saved.folder / "f", os.O_RDONLY)
    mapped = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE,
                       prot=mmap.PROT_READ | mmap.PROT_WRITE)
    target = ctypes.create_string_buffer(len(data))
    ctypes.memmove(target, (ctypes.c_char * len(data)).from_buffer(mapped), len(data))
    os.close(descriptor)
    assert target.raw == data


def test_log_artifact_to_a_local_directory(saved):
    temporary = saved.folder / ".artifact.uploading.x"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    for _ in range(12):
        os.write(descriptor, b"x" * (1 << 20))
    os.close(descriptor)
    os.utime(temporary, (1, 1))
    os.chmod(temporary, 0o644)
    os.rename(temporary, saved.folder / "artifact")
    saved.check("artifact")


def test_a_fork_that_only_inherited_the_descriptor(saved):
    descriptor = os.open(saved.folder / "f", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, b"half")
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert saved.names() == []
    os.write(descriptor, b" whole")
    os.close(descriptor)
    saved.check("f")
