"""Attacks on the tier `python`: what code that runs there may try, in every family."""

from __future__ import annotations

import pyseccomp  # type: ignore[import-untyped]

from tests.prove.sandbox.attack import Attack, Family

_WRITES = "open('mine.txt', 'w').write('x')\nprint('ALLOWED')"
_READS = "import os\nprint('ALLOWED' if open(os.__file__).read() and os.listdir(os.path.dirname(os.__file__)) else '')"
_PAIR = "import socket\na, b = socket.socketpair()\na.send(b'x')\nprint('ALLOWED' if b.recv(1) else '')"
_THREAD = "import threading\nt = threading.Thread(target=print, args=('ALLOWED',))\nt.start()\nt.join()"
_C = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"


def _number(name: str) -> int:
    return int(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name))


# the same way into the kernel, for a call that harms nobody
_HARMLESS = f"{_C}print('ALLOWED' if libc.syscall(ctypes.c_long({_number('getpid')})) == os.getpid() else '')"
_CLONE = (
    f"child = libc.syscall(ctypes.c_long({_number('clone')}), {{flags}}, 0, 0, 0, 0)\n"
    "if child == 0:\n    os._exit(0)\nprint('ESCAPED' if child > 0 else '')"
)


def _call(family: Family, name: str, *arguments: str) -> Attack:
    """A call of the kernel that no code has any business with: it escapes when the kernel does it, or would with better arguments."""
    call = ", ".join([f"ctypes.c_long({_number(name)})", *arguments])
    code = f"{_C}done = libc.syscall({call})\nprint('ESCAPED' if done >= 0 or ctypes.get_errno() in (14, 22, 9, 3, 2, 20) else '')"
    return Attack(f"call {name}", family, code, control=_HARMLESS)


def _attempt(name: str, family: Family, code: str, control: str = "", *, outside: bool = True) -> Attack:
    return Attack(name, family, code, control=control, outside=outside)


FILES = [
    _attempt("read a secret", "files", "print('ESCAPED' if open(secret_file).read() == canary else '')", _READS),
    _attempt("read it by way of ..", "files",
        "import os\nup = '../' * 12\nprint('ESCAPED' if open(up + secret_file).read() == canary else '')",
    ),
    _attempt("read the accounts", "files", "print('ESCAPED' if 'root' in open('/etc/passwd').read() else '')"),
    _attempt("list the root's children", "files", "import os\nprint('ESCAPED' if os.listdir(outside_folder) else '')", _READS),
    _attempt("write outside", "files",
        "open(outside_folder + '/new', 'w').write('x')\nimport os\nos.unlink(outside_folder + '/new')\nprint('ESCAPED')",
        _WRITES,
    ),
    _attempt("append to a secret", "files", "open(secret_file, 'a').write('')\nprint('ESCAPED')"),
    _attempt("truncate a secret", "files", "import os\nos.truncate(secret_file, len(canary))\nprint('ESCAPED')"),
    _attempt("truncate by opening to read", "files",
        "import os\nopen('f', 'w').write('x')\nos.open(secret_file if False else 'f', os.O_RDONLY | os.O_TRUNC)\n"
        "print('ESCAPED' if os.stat('f').st_size == 0 else '')",
        _WRITES,
    ),
    _attempt("rename a file away", "files",
        "import os\nos.rename(secret_file, secret_file + '2')\nos.rename(secret_file + '2', secret_file)\nprint('ESCAPED')",
    ),
    _attempt("make a folder outside", "files",
        "import os\nos.mkdir(outside_folder + '/d')\nos.rmdir(outside_folder + '/d')\nprint('ESCAPED')",
        "import os\nos.mkdir('d')\nprint('ALLOWED')",
    ),
    _attempt("change a mode", "files",
        "import os\nbefore = os.stat(secret_file).st_mode\nos.chmod(secret_file, 0o600)\nafter = os.stat(secret_file).st_mode\n"
        "os.chmod(secret_file, before & 0o777)\nprint('ESCAPED' if before != after else '')",
    ),
    _attempt("change a time", "files",
        "import os\nnew = int.from_bytes(os.urandom(3), 'big')\nos.utime(secret_file, (new, new))\n"
        "print('ESCAPED' if os.stat(secret_file).st_mtime == new else '')",
    ),
    _attempt("overwrite the library", "files", "import os\nopen(os.__file__, 'r+').close()\nprint('ESCAPED')", _READS, outside=False),
    _attempt("plant a module", "files",
        "import os\npath = os.path.dirname(os.__file__) + '/netra_planted.py'\nopen(path, 'w').close()\nos.unlink(path)\n"
        "print('ESCAPED')",
        _WRITES, outside=False,
    ),
    _attempt("look for the dispatcher's settings", "files",
        "import services.dispatcher.settings\nprint('ESCAPED')",
        "import json\nprint('ALLOWED')",
        outside=False,
    ),
]  # fmt: skip

WORKSPACES = [
    _attempt("read another's file", "workspaces",
        "print('ESCAPED' if open(other_folder + '/theirs.txt').read() == canary else '')",
        _WRITES,
    ),
    _attempt("list another's folder", "workspaces", "import os\nprint('ESCAPED' if os.listdir(other_folder) else '')"),
    _attempt("write into another's folder", "workspaces",
        "import os\nopen(other_folder + '/x', 'w').close()\nos.unlink(other_folder + '/x')\nprint('ESCAPED')",
        _WRITES,
    ),
    _attempt("see who else has a folder", "workspaces",
        "import os\nprint('ESCAPED' if 'other' in os.listdir(os.path.dirname(other_folder)) else '')",
    ),
    _attempt("change into another's folder", "workspaces",
        "import os\nos.chdir(other_folder)\nprint('ESCAPED' if open('theirs.txt').read() == canary else '')",
    ),
]  # fmt: skip

LINKS = [
    _attempt("symlink to a secret", "links",
        "import os\nos.symlink(secret_file, 'l')\nprint('ESCAPED' if open('l').read() == canary else '')",
    ),
    _attempt("leave a symlink", "links", "import os\nos.symlink('/etc/passwd', 'left')\nprint('ESCAPED')"),
    _attempt("hard link to a secret", "links",
        "import os\nos.link(secret_file, outside_folder + '/hard')\nos.unlink(outside_folder + '/hard')\nprint('ESCAPED')",
        "import os\nopen('a', 'w').close()\nos.link('a', 'b')\nprint('ALLOWED')",
    ),
    _attempt("hard link into the folder", "links",
        "import os\nos.link(os.__file__, 'l')\nprint('ESCAPED')",
        "import os\nopen('a', 'w').close()\nos.link('a', 'b')\nprint('ALLOWED')",
        outside=False,
    ),
    _attempt("leave a pipe", "links", "import os\nos.mkfifo('p')\nprint('ESCAPED')"),
    _attempt("make a device", "links",
        "import os, stat\nos.mknod('d', stat.S_IFCHR | 0o666, os.makedev(1, 1))\nprint('ESCAPED')",
        _WRITES, outside=False,
    ),
]  # fmt: skip

_PRIVATE_PROC = ("environ", "mem", "maps", "cmdline", "fd", "root", "cwd")
PROC = [
    _attempt("list the processes", "proc",
        "import os\nprint('ESCAPED' if [name for name in os.listdir('/proc') if name.isdigit()] else '')",
    ),
    *(
        _attempt(f"read {name} of another", "proc",
            f"import os\npath = f'/proc/{{victim_pid}}/{name}'\n"
            f"os.listdir(path) if os.path.isdir(path) else open(path, 'rb').close()\nprint('ESCAPED')",
        )
        for name in _PRIVATE_PROC
    ),
    _attempt("read of the parent", "proc", "import os\nopen(f'/proc/{os.getppid()}/environ', 'rb').read()\nprint('ESCAPED')", _READS),
    _attempt("go through one's own root", "proc", "open('/proc/self/root' + secret_file).read()\nprint('ESCAPED')"),
    _attempt("read of itself", "proc", "print('ESCAPED' if open('/proc/self/status').read() else '')"),
    _attempt("change the kernel's settings", "proc",
        "open('/proc/sys/kernel/core_pattern', 'r+').close()\nprint('ESCAPED')",
        _READS, outside=False,
    ),
]  # fmt: skip

ENVIRONMENT = [
    _attempt("find the dispatcher's environment", "environment",
        "import os\nprint('ESCAPED' if set(os.environ) & {'PATH', 'NETRA_SECRET', 'HOME'} else '')",
        "import os\nprint('ALLOWED' if os.environ.get('GIVEN') == 'yes' else '')",
    ),
    _attempt("find it in memory", "environment",
        _C + "env = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, 'environ')\n"
        "found = []\nwhile env and env[len(found)]:\n    found.append(env[len(found)])\n"
        "print('ESCAPED' if any(item.startswith((b'NETRA_', b'PATH=')) for item in found) else '')",
    ),
    _attempt("read one's own start", "environment", "print('ESCAPED' if open('/proc/self/environ', 'rb').read() else '')"),
]  # fmt: skip

SIGNALS = [
    _attempt("signal the victim", "signals",
        "import os\nos.kill(victim_pid, 0)\nprint('ESCAPED')",
        "import signal\nsignal.signal(signal.SIGUSR1, print)\nprint('ALLOWED')",
    ),
    _attempt("kill the parent", "signals", "import os\nos.kill(os.getppid(), 0)\nprint('ESCAPED')"),
    _attempt("kill everybody", "signals", "import os\nos.kill(-1, 0)\nprint('ESCAPED')", outside=True),
    _attempt("kill the group", "signals", "import os\nos.killpg(0, 0)\nprint('ESCAPED')"),
    _attempt("signal by a descriptor", "signals",
        "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(victim_pid), 0)\nprint('ESCAPED')",
    ),
    _attempt("have it signalled for a file", "signals",
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, victim_pid)\n"
        "print('ESCAPED' if fcntl.fcntl(r, fcntl.F_GETOWN) == victim_pid else '')",
        "import fcntl, os\nr, w = os.pipe()\nprint('ALLOWED' if fcntl.fcntl(r, fcntl.F_GETFL) >= 0 else '')",
    ),
    _attempt("slow it down", "signals",
        "import os\nos.setpriority(os.PRIO_PROCESS, victim_pid, os.getpriority(os.PRIO_PROCESS, victim_pid))\nprint('ESCAPED')",
    ),
    _attempt("limit it", "signals",
        "import resource\nresource.prlimit(victim_pid, resource.RLIMIT_CORE)\nprint('ESCAPED')",
        "import resource\nresource.prlimit(0, resource.RLIMIT_CORE)\nprint('ALLOWED')",
    ),
    _attempt("outlive the zygote", "daemons", _C + "print('ESCAPED' if libc.prctl(1, 0, 0, 0, 0) == 0 else '')", outside=True),
]  # fmt: skip

_SCAN = """
class Part(ctypes.Structure):
    _fields_ = [('base', ctypes.c_void_p), ('size', ctypes.c_size_t)]
text = ctypes.create_string_buffer(len(canary))
mine, theirs = Part(ctypes.addressof(text), len(canary)), Part(victim_address, len(canary))
"""
MEMORY_OF_OTHERS = [
    _attempt("read another's memory", "memory of others",
        f"{_C}{_SCAN}libc.process_vm_readv(victim_pid, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0)\n"
        f"print('ESCAPED' if text.value == canary.encode()[:len(text)] and text.raw.decode() == canary else '')",
    ),
    _attempt("write another's memory", "memory of others",
        f"{_C}{_SCAN}text.raw = canary.encode()\n"
        f"print('ESCAPED' if libc.process_vm_writev(victim_pid, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0) > 0 else '')",
    ),
    _attempt("open another's memory", "memory of others",
        "file = open(f'/proc/{victim_pid}/mem', 'rb')\nfile.seek(victim_address)\n"
        "print('ESCAPED' if file.read(len(canary)).decode() == canary else '')",
    ),
    _attempt("trace another", "ptrace",
        f"{_C}done = libc.ptrace(16, victim_pid, 0, 0)\nif done == 0:\n    os.waitpid(victim_pid, 0x40000000)\n"
        f"    libc.ptrace(17, victim_pid, 0, 0)\n    print('ESCAPED')",
    ),
    _attempt("be traced by the parent", "ptrace",
        f"{_C}import sys\nprint('ESCAPED' if libc.ptrace(0, 0, 0, 0) == 0 else '')\nsys.stdout.flush()",
    ),
    _attempt("attach a shared segment", "memory of others",
        f"{_C}done = libc.shmget(0, 4096, 0o1600)\nprint('ESCAPED' if done >= 0 and libc.shmctl(done, 0, 0) == 0 else '')",
    ),
]  # fmt: skip

NETWORK = [
    _attempt("connect over TCP", "tcp", "import socket\nsocket.create_connection(('127.0.0.1', tcp_port), 2)\nprint('ESCAPED')", _PAIR),
    _attempt("serve over TCP", "tcp",
        "import socket\nserver = socket.socket()\nserver.bind(('127.0.0.1', 0))\nserver.listen()\nprint('ESCAPED')",
    ),
    _attempt("serve over IPv6", "tcp", "import socket\nserver = socket.socket(socket.AF_INET6)\nprint('ESCAPED')"),
    _attempt("send over UDP", "udp",
        "import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', udp_port))\nprint('ESCAPED')",
        _PAIR,
    ),
    _attempt("ask a name server", "dns",
        "import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x' * 12, ('127.0.0.1', 53))\nprint('ESCAPED')",
    ),
    _attempt("resolve a name", "dns",
        "import socket\nprint('ESCAPED' if socket.getaddrinfo('localhost', 80) else '')",
        _PAIR, outside=False,
    ),
    _attempt("craft packets", "sockets",
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)\nprint('ESCAPED')",
        _PAIR, outside=False,
    ),
    _attempt("sniff packets", "sockets",
        "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)\nprint('ESCAPED')",
        _PAIR, outside=False,
    ),
    _attempt("speak to the kernel", "sockets", "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\nprint('ESCAPED')"),
    _attempt("connect to a socket by path", "sockets",
        "import socket\nsocket.socket(socket.AF_UNIX).connect(socket_path)\nprint('ESCAPED')",
        _PAIR,
    ),
    _attempt("connect to an abstract socket", "sockets",
        "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0' + socket_name)\nprint('ESCAPED')",
        _PAIR,
    ),
    _attempt("leave an abstract socket", "sockets", "import socket\nsocket.socket(socket.AF_UNIX).bind('\\0' + mark)\nprint('ESCAPED')"),
    _attempt("send from a pair", "sockets",
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\nprint('ESCAPED')",
        _PAIR,
    ),
    _attempt("connect a pair anew", "sockets",
        "import socket\na, b = socket.socketpair()\ntry:\n    a.connect(socket_path)\n    print('ESCAPED')\n"
        "except OSError as error:\n    print('ESCAPED' if error.errno in (106, 22) else '')",
        _PAIR,
    ),
]  # fmt: skip

_NAMED = "import ctypes, os, time\nctypes.CDLL(None).prctl(15, mark.encode(), 0, 0, 0)\n"
PROCESSES = [
    _attempt("fork", "fork", "import os, sys\nif os.fork() == 0:\n    os._exit(0)\nos.wait()\nprint('ESCAPED')", _THREAD),
    _attempt("vfork", "fork", "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''], check=True)\nprint('ESCAPED')", _THREAD),
    _attempt("spawn", "execution",
        "import os, sys\nos.waitpid(os.posix_spawn('/bin/sh', ['sh', '-c', 'true'], {}), 0)\nprint('ESCAPED')",
        _THREAD,
    ),
    _attempt("become another program", "execution", "import os\nprint('', flush=True)\nos.execv('/bin/echo', ['echo', 'ESCAPED'])"),
    _attempt("run from memory", "execution",
        "import os\nfd = os.memfd_create('x')\nos.write(fd, open('/bin/echo', 'rb').read())\n"
        "os.execve(fd, ['echo', 'ESCAPED'], {})",
    ),
    _attempt("run what it wrote", "execution",
        "import os\nopen('run', 'w').write('#!/bin/sh\\necho ESCAPED\\n')\nos.chmod('run', 0o700)\nos.execv('./run', ['run'])",
        _WRITES,
    ),
    _attempt("fork bomb", "fork",
        "import os\nborn = 0\nfor _ in range(40):\n    if os.fork() == 0:\n        os._exit(0)\n    born += 1\n"
        "print('ESCAPED' if born == 40 else '')",
        _THREAD, outside=True,
    ),
    _attempt("clone by number", "fork", _C + _CLONE.format(flags="17")),
    _attempt("clone sharing memory", "fork", _C + _CLONE.format(flags="0x4000 | 17")),
    _attempt("leave a daemon", "daemons",
        _NAMED + "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n    os._exit(0)\n"
        "print('ESCAPED')",
        outside=False, control=_THREAD,
    ),
    _attempt("leave the session", "daemons", "import os\nos.setsid()\nprint('ESCAPED')"),
    _attempt("leave a thread", "daemons",
        _NAMED + "import threading\nthreading.Thread(target=time.sleep, args=(60,)).start()\nresult = 1",
        _THREAD, outside=False,
    ),
]  # fmt: skip

_BRIEF = "import time\nwhile time.process_time() < 0.05:\n    pass\nprint('ALLOWED')"
BOMBS = [
    _attempt("threads", "threads",
        "import threading, time\nthreading.stack_size(32768)\n"
        "threads = [threading.Thread(target=time.sleep, args=(30,), daemon=True) for _ in range(2000)]\n"
        "for thread in threads:\n    thread.start()\ntime.sleep(1)\nprint('ESCAPED')",
        _THREAD, outside=False,
    ),
    _attempt("memory at once", "memory",
        "block = bytearray(2 << 30)\nprint('ESCAPED')",
        "block = bytearray(64 << 20)\nprint('ALLOWED')",
        outside=False,
    ),
    _attempt("memory bit by bit", "memory",
        "blocks = []\nfor _ in range(1024):\n    blocks.append(bytes(2 << 20))\nprint('ESCAPED')",
        "blocks = [bytes(1 << 20) for _ in range(64)]\nprint('ALLOWED')",
        outside=False,
    ),
    _attempt("memory mapped", "memory",
        "import mmap\nmaps = [mmap.mmap(-1, 64 << 20) for _ in range(32)]\nprint('ESCAPED')",
        "import mmap\nmmap.mmap(-1, 1 << 20)\nprint('ALLOWED')",
        outside=False,
    ),
    _attempt("memory without an address", "memory", "import os\nfd = os.memfd_create('x')\nos.write(fd, b'x')\nprint('ESCAPED')"),
    _attempt("memory locked", "memory",
        _C + "text = ctypes.create_string_buffer(1 << 20)\nprint('ESCAPED' if libc.mlock(text, 1 << 20) == 0 else '')",
        "block = bytearray(1 << 20)\nprint('ALLOWED')",
        outside=False,
    ),
    _attempt("a big file", "disk",
        "import os\nwith open('big', 'wb') as file:\n    for _ in range(80):\n        file.write(bytes(1 << 20))\n"
        "print('ESCAPED' if os.stat('big').st_size > (66 << 20) else '')",
        "with open('big', 'wb') as file:\n    file.write(bytes(1 << 20))\nprint('ALLOWED')",
        outside=False,
    ),
    _attempt("many files", "disk",
        "import time\nfor number in range(12):\n    with open(f'f{number}', 'wb') as file:\n        for _ in range(8):\n"
        "            file.write(bytes(1 << 20))\ntime.sleep(1)\nprint('ESCAPED')",
        "open('f', 'wb').write(bytes(1 << 20))\nprint('ALLOWED')",
        outside=False,
    ),
    _attempt("removed files", "disk",
        "import os, time\nkept = []\nfor number in range(12):\n    file = open(f'f{number}', 'wb')\n"
        "    os.unlink(f'f{number}')\n    for _ in range(8):\n        file.write(bytes(1 << 20))\n    kept.append(file)\n"
        "time.sleep(1)\nprint('ESCAPED')",
        "import os\nfile = open('f', 'wb')\nos.unlink('f')\nfile.write(b'x')\nprint('ALLOWED')",
        outside=False,
    ),
    _attempt("inodes", "inodes",
        "import time\nfor number in range(6000):\n    open(f'f{number}', 'w').close()\ntime.sleep(1)\nprint('ESCAPED')",
        "for number in range(100):\n    open(f'f{number}', 'w').close()\nprint('ALLOWED')",
        outside=False,
    ),
    _attempt("time of the processor", "cpu",
        "import time\nwhile time.process_time() < 5:\n    pass\nprint('ESCAPED')",
        _BRIEF, outside=False,
    ),
    _attempt("time, when told to stop", "cpu",
        "import signal, time\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile time.process_time() < 5:\n    pass\n"
        "print('ESCAPED')",
        _BRIEF, outside=False,
    ),
    _attempt("more time by a limit of its own", "cpu",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (60, 60))\nprint('ESCAPED')",
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))\nprint('ALLOWED')",
        outside=False,
    ),
    _attempt("descriptors", "descriptors",
        "import os\nfor _ in range(500):\n    os.dup(1)\nprint('ESCAPED')",
        "import os\nos.dup(1)\nprint('ALLOWED')",
        outside=True,
    ),
    _attempt("inherited descriptors", "descriptors",
        "import os\nopen_ = []\nfor fd in range(5, 4096):\n    try:\n        os.fstat(fd)\n        open_.append(fd)\n"
        "    except OSError:\n        pass\nprint('ESCAPED' if open_ else '')",
        "import os\nprint('ALLOWED' if os.fstat(1) and os.fstat(4) else '')",
        outside=False,
    ),
    _attempt("another's result", "descriptors",
        "import os\nos.pwrite(4, b'x', 0)\nprint('ESCAPED' if os.fstat(3).st_size == 0 else '')",
        "import os\nprint('ALLOWED' if os.fstat(3).st_size else '')",
        outside=False,
    ),
    _attempt("change the request", "descriptors",
        "import os\nos.pwrite(3, b'x', 0)\nprint('ESCAPED')",
        "import os\nos.pread(3, 1, 0)\nprint('ALLOWED')",
        outside=False,
    ),
    _attempt("grow the output", "output", "import os\nos.ftruncate(1, 1 << 30)\nprint('ESCAPED')", "print('ALLOWED')", outside=False),
    _attempt("write beyond the output", "output",
        "import os\nos.lseek(1, 1 << 29, 0)\nwrote = os.write(1, b'x' * 1000)\nos.lseek(1, 0, 0)\n"
        "print('ESCAPED' if wrote else '')",
        "print('ALLOWED')",
        outside=False,
    ),
]  # fmt: skip

LEFTOVERS = [
    *(
        _attempt(f"leave a file in {place}", "leftovers",
            f"import os\npath = '{place}/' + mark\nopen(path, 'w').close()\nprint('ESCAPED')\nos.unlink(path)",
        )
        for place in ("/tmp", "/var/tmp", "/dev/shm")
    ),
    _attempt("leave a semaphore", "leftovers", "import multiprocessing\nmultiprocessing.Semaphore()\nprint('ESCAPED')"),
    _attempt("leave a queue", "leftovers",
        f"{_C}done = libc.msgget(0, 0o1600)\nprint('ESCAPED' if done >= 0 and libc.msgctl(done, 0, 0) == 0 else '')",
    ),
]  # fmt: skip

_NEW = {"user": 0x10000000, "mounts": 0x20000, "processes": 0x20000000, "network": 0x40000000, "groups": 0x02000000, "ipc": 0x08000000}
KERNEL = [
    *(
        _attempt(f"a namespace of {name}", "namespaces",
            f"{_C}print('ESCAPED' if libc.unshare({flag}) == 0 else '')", _HARMLESS, outside=False,
        )
        for name, flag in _NEW.items()
    ),
    _attempt("a namespace by clone", "namespaces", _C + _CLONE.format(flags="0x10000000 | 17"), _HARMLESS, outside=False),
    _call("namespaces", "clone3", "0", "0"),
    _call("namespaces", "setns", "0", "0"),
    _call("namespaces", "mount", "b'none'", "b'/'", "0", "0", "0"),
    _call("namespaces", "umount2", "b'/'", "2"),
    _call("namespaces", "pivot_root", "b'.'", "b'.'"),
    _call("namespaces", "chroot", "b'.'"),
    _call("namespaces", "open_tree", "-100", "b'/'", "1"),
    _call("namespaces", "fsopen", "b'tmpfs'", "0"),
    _call("io_uring", "io_uring_setup", "8", "0"),
    _call("io_uring", "io_uring_enter", "0", "0", "0", "0", "0", "0"),
    _call("io_uring", "io_uring_register", "0", "0", "0", "0"),
    _call("kernel", "bpf", "0", "0", "0"),
    _call("kernel", "perf_event_open", "0", "0", "-1", "-1", "0"),
    _call("kernel", "userfaultfd", "0"),
    _call("kernel", "keyctl", "0", "0", "0"),
    _call("kernel", "add_key", "0", "0", "0", "0", "0"),
    _call("kernel", "request_key", "0", "0", "0", "0"),
    _call("kernel", "init_module", "0", "0", "0"),
    _call("kernel", "kexec_load", "0", "0", "0", "0"),
    _call("kernel", "open_by_handle_at", "-1", "0", "0"),
    _call("kernel", "personality", "0x0040000"),
    _call("kernel", "seccomp", "0", "0", "0"),
    _call("kernel", "setuid", "0"),
    _call("kernel", "process_madvise", "0", "0", "0", "0", "0"),
    _call("kernel", "kcmp", "0", "0", "0", "0", "0"),
    _call("kernel", "inotify_init1", "0"),
]  # fmt: skip

ATTACKS: list[Attack] = [
    *FILES, *WORKSPACES, *LINKS, *PROC, *ENVIRONMENT, *SIGNALS, *MEMORY_OF_OTHERS, *NETWORK, *PROCESSES, *BOMBS, *LEFTOVERS, *KERNEL,
]  # fmt: skip
