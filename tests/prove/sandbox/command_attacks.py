"""What a command may try: Python for `python3 -c` inside of bubblewrap; pure."""

from __future__ import annotations

from tests.prove.sandbox.attack import Attack

# calls of the kernel by name, and one that is allowed everywhere, by the same way
_CALLS = """
import ctypes, os, platform
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
X86 = platform.machine() == "x86_64"
NUMBERS = {
    "getpid": (39, 172), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217), "init_module": (175, 105),
    "kexec_load": (246, 104), "reboot": (169, 142), "swapon": (167, 224), "sethostname": (170, 161), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "personality": (135, 92), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "io_uring_setup": (425, 425), "memfd_create": (319, 279), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "open_tree": (428, 428),
    "fsopen": (430, 430), "syslog": (103, 116), "acct": (163, 89), "quotactl": (179, 60), "shmget": (29, 194), "mq_open": (240, 180),
    "fanotify_init": (300, 262), "kcmp": (312, 272), "clone3": (435, 435), "iopl": (172, None), "modify_ldt": (154, None),
}
def call(name, *arguments):
    number = NUMBERS[name][0 if X86 else 1]
    if number is None:
        return -1
    return libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
"""
_WAY = _CALLS + '\nif call("getpid") == os.getpid(): print("ALLOWED")'


def _kernel(name: str, family: str, expression: str, *, outside: bool = False) -> Attack:
    """A call of the kernel that must not succeed. Where even the one who starts it may not, the control is another call, same way."""
    code = f'{_CALLS}\nif {expression}: print("ESCAPED")'
    return Attack(name, family, code, control=_WAY, outside=outside)  # type: ignore[arg-type]


def _file(name: str, family: str, theirs: str, own: str = "", *, before: str = "", outside: bool = False) -> Attack:
    """Something that is done to a file of others, and, as its control, to a file of one's own."""
    code = 'import os, pathlib\n{}\nprint("{}")'
    control = code.format(f"open('mine.txt', 'w').write('x')\n{before}\n{own}", "ALLOWED") if own else ""
    return Attack(name, family, code.format(theirs, "ESCAPED"), control=control, outside=outside)  # type: ignore[arg-type]


_FILES = (
    _file("read", "files", "assert canary in open(secret_file).read()", outside=True),
    _file("read through pathlib", "files", "assert canary in pathlib.Path(secret_file).read_text()", outside=True),
    _file("overwrite", "files", "open(secret_file, 'w').write('x')", "open('mine.txt', 'w').write('x')"),
    _file("append", "files", "open(secret_file, 'a').write('x')", "open('mine.txt', 'a').write('x')"),
    _file("truncate", "files", "os.truncate(secret_file, 0)", "os.truncate('mine.txt', 0)"),
    _file("delete", "files", "os.unlink(secret_file)", "os.unlink('mine.txt')"),
    _file("rename", "files", "os.rename(secret_file, outside_folder + '/y')", "os.rename('mine.txt', 'y')"),
    _file("change the mode", "files", "os.chmod(secret_file, 0)", "os.chmod('mine.txt', 0)"),
    _file("create", "files", "open(outside_folder + '/new', 'x')", "open('new', 'x')"),
    _file("make a folder", "files", "os.mkdir(outside_folder + '/new')", "os.mkdir('new')"),
    _file("list", "files", "assert 'secret.txt' in os.listdir(outside_folder)", outside=True),
    _file("a link to it", "links", "os.symlink(secret_file, 'l'); assert canary in open('l').read()", outside=True),
    _file("a hard link to it", "links", "os.link(secret_file, 'h')", "os.link('mine.txt', 'h')"),
    _file("up and away", "files", "assert canary in open('../' * 30 + secret_file).read()", outside=True),
    _file(
        "the root of the first process",
        "proc",
        "assert canary in open('/proc/1/root' + secret_file).read()",
        "assert 'x' in open('/proc/self/root' + os.getcwd() + '/mine.txt').read()",
    ),
    _file(
        "the working folder of the first process",
        "proc",
        "assert canary in open('/proc/1/cwd/../../../../../' + secret_file).read()",
        "assert 'x' in open('/proc/self/cwd/mine.txt').read()",
    ),
    _file("programs of the system", "files", "open('/usr/bin/netra-new', 'w')", "open('netra-new', 'w')"),
    _file("the libraries", "files", "os.rename('/usr/lib', '/usr/lib.old')", "os.mkdir('a'); os.rename('a', 'b')"),
    _file("the root folder", "files", "open('/new', 'w')", "open('new', 'w')"),
    _file("the passwords", "files", "open('/etc/passwd', 'a').write('x')", "open('mine.txt', 'a').write('x')"),
    _file("the shadow", "files", "assert open('/etc/shadow').read()", "assert open('/etc/passwd').read()"),
    _file("the home of root", "files", "assert os.listdir('/root')", "assert os.listdir('/')"),
    _file("memory that is a disk", "disk", "open('/dev/shm/x', 'w')", "open('x', 'w')"),
    _file("a device", "files", "os.mknod('d', 0o60600, os.makedev(254, 0))", "os.mkdir('d')"),
    _file(
        "a disk",
        "files",
        "assert any(os.access('/dev/' + n, os.R_OK) for n in ('vda', 'sda', 'nvme0n1', 'mem', 'kmsg', 'fuse', 'kvm'))",
        "assert os.access('/dev/null', os.R_OK)",
    ),
    _file(
        "settings of the kernel", "proc", "open('/proc/sys/kernel/hostname', 'w').write('x')", "open('/proc/sys/kernel/hostname').read()"
    ),
    _file("the alarm cord", "proc", "open('/proc/sysrq-trigger', 'w').write('h')", "open('/proc/self/comm', 'w').write('h')"),
    _file(
        "what the kernel may do for it",
        "proc",
        "open('/proc/sys/kernel/core_pattern', 'w').write('|/bin/sh')",
        "open('/proc/sys/kernel/core_pattern').read()",
    ),
    _file("control groups", "proc", "os.mkdir('/sys/fs/cgroup/netra')", "os.mkdir('netra')"),
    _file("another call's file", "workspaces", "assert canary in open(other_folder + '/theirs.txt').read()", outside=True),
    _file("into another call's folder", "workspaces", "open(other_folder + '/mine', 'w')", "open('mine', 'w')"),
    _file("all folders of calls", "workspaces", "assert os.listdir(os.path.dirname(other_folder))", outside=True),
    _file(
        "a link into another call's folder",
        "links",
        "os.symlink(other_folder, 'o'); assert canary in open('o/theirs.txt').read()",
        outside=True,
    ),
    _file("another's environment", "environment", "assert open(f'/proc/{outside_pid}/environ').read()", outside=True),
    _file(
        "what the starter has in its environment",
        "environment",
        "assert set(os.environ) - {'PATH', 'HOME', 'TMPDIR', 'LANG', 'LC_CTYPE', 'TZ', 'PWD', 'OLDPWD', 'SHLVL', '_'}",
        outside=True,
    ),
    _file(
        "the environment of the first process",
        "environment",
        "assert any(v.split(b'=')[0] not in b'PATH HOME TMPDIR LANG TZ PWD SHLVL _'.split() for v in "
        "open('/proc/1/environ', 'rb').read().split(b'\\0') if v)",
        "assert b'PATH=' in open('/proc/self/environ', 'rb').read()",
    ),
    _file("processes outside", "proc", "assert os.path.exists(f'/proc/{victim_pid}/maps')", outside=True),
    _file(
        "command lines outside",
        "proc",
        "assert any(canary_pid.isdigit() and int(canary_pid) == victim_pid for canary_pid in os.listdir('/proc'))",
        outside=True,
    ),
)

_OTHERS = (
    Attack(
        "memory of a process",
        "memory of others",
        "f = open(f'/proc/{victim_pid}/mem', 'rb'); f.seek(victim_address)\nif canary.encode() in f.read(64): print('ESCAPED')",
        control="import ctypes\nb = ctypes.create_string_buffer(b'own')\nf = open('/proc/self/mem', 'rb'); f.seek(ctypes.addressof(b))\n"
        "if f.read(3) == b'own': print('ALLOWED')",
    ),
    _kernel(
        "memory by process_vm_readv",
        "memory of others",
        "(lambda b: call('process_vm_readv', victim_pid, (ctypes.c_void_p * 2)(ctypes.addressof(b), 32), 1, "
        "(ctypes.c_void_p * 2)(victim_address, 32), 1, 0) > 0)(ctypes.create_string_buffer(32))",
    ),
    _kernel(
        "memory by process_vm_writev",
        "memory of others",
        "(lambda b: call('process_vm_writev', victim_pid, (ctypes.c_void_p * 2)(ctypes.addressof(b), 1), 1, "
        "(ctypes.c_void_p * 2)(victim_address + 40, 1), 1, 0) > 0)(ctypes.create_string_buffer(1))",
    ),
    _kernel("attach", "ptrace", "call('ptrace', 16, victim_pid, 0, 0) == 0"),
    _kernel("seize", "ptrace", "call('ptrace', 0x4206, victim_pid, 0, 0) == 0"),
    _kernel("be traced", "ptrace", "call('ptrace', 0, 0, 0, 0) == 0", outside=True),
    _kernel("a descriptor of another", "descriptors", "call('pidfd_getfd', call('pidfd_open', victim_pid, 0), 0, 0) >= 0"),
    _kernel("compare with another", "memory of others", "call('kcmp', os.getpid(), victim_pid, 0, 0, 0) >= 0"),
    Attack("a signal", "signals", "import os\nos.kill(victim_pid, 0)\nprint('ESCAPED')", outside=True),
    Attack("a signal to who watches", "signals", "import os\nos.kill(outside_pid, 0)\nprint('ESCAPED')", outside=True),
    Attack(
        "a signal through a descriptor",
        "signals",
        "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(victim_pid), 0)\nprint('ESCAPED')",
        outside=True,
    ),
    Attack("a signal to a group outside", "signals", "import os\nos.killpg(os.getpgid(victim_pid), 0)\nprint('ESCAPED')", outside=True),
    Attack(
        "hold back the first process",
        "signals",
        "import os, signal, time\nos.kill(1, signal.SIGSTOP); os.kill(1, signal.SIGKILL)\n"
        "time.sleep(0.2)\nprint('ESCAPED' if not os.path.exists('/proc/1') else '')",
        control="import os\nos.kill(os.getpid(), 0)\nprint('ALLOWED')",
    ),
)

_SOCKET = "import socket, os\n"
_PAIR = _SOCKET + "a, b = socket.socketpair(); a.send(b'x')\nif b.recv(1) == b'x': print('ALLOWED')"
_NET = (
    Attack("connect", "tcp", _SOCKET + "socket.create_connection(('127.0.0.1', tcp_port), 2)\nprint('ESCAPED')", outside=True),
    Attack("connect by name", "tcp", _SOCKET + "socket.create_connection(('localhost', tcp_port), 2)\nprint('ESCAPED')", control=_PAIR),
    Attack("listen", "tcp", _SOCKET + "s = socket.socket(); s.bind(('0.0.0.0', 0)); s.listen()\nprint('ESCAPED')", outside=True),
    Attack("over version 6", "tcp", _SOCKET + "s = socket.socket(socket.AF_INET6)\nprint('ESCAPED')", control=_PAIR),
    Attack(
        "send",
        "udp",
        _SOCKET + "s = socket.socket(type=socket.SOCK_DGRAM); s.sendto(b'x', ('127.0.0.1', udp_port))\nprint('ESCAPED')",
        outside=True,
    ),
    Attack(
        "ask for a name",
        "dns",
        _SOCKET + "s = socket.socket(type=socket.SOCK_DGRAM)\n"
        "s.sendto(bytes.fromhex('12340100000100000000000001610162000001' + '0001'), ('127.0.0.1', udp_port))\nprint('ESCAPED')",
        outside=True,
    ),
    Attack("ask for a name of the library", "dns", _SOCKET + "s = socket.getaddrinfo('example.com', 80)\nprint('ESCAPED')", control=_PAIR),
    Attack("raw packets", "udp", _SOCKET + "s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)\nprint('ESCAPED')", control=_PAIR),
    Attack(
        "talk to the kernel's network",
        "sockets",
        _SOCKET + "s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)\nprint('ESCAPED')",
        outside=True,
    ),
    Attack("the machine's host", "sockets", _SOCKET + "s = socket.socket(socket.AF_VSOCK)\nprint('ESCAPED')", control=_PAIR),
    Attack(
        "the kernel's ciphers",
        "sockets",
        _SOCKET + "s = socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)\nprint('ESCAPED')",
        control=_PAIR,
    ),
    Attack(
        "a socket by its path",
        "sockets",
        _SOCKET + "s = socket.socket(socket.AF_UNIX); s.connect(socket_path)\nprint('ESCAPED')",
        outside=True,
    ),
    Attack(
        "an abstract socket",
        "sockets",
        _SOCKET + "s = socket.socket(socket.AF_UNIX); s.connect('\\0' + socket_name)\nprint('ESCAPED')",
        outside=True,
    ),
)

_FORK = """
import os, signal, time
def many(most):
    children = []
    try:
        for _ in range(most):
            if (pid := os.fork()) == 0:
                time.sleep(30); os._exit(0)
            children.append(pid)
        return True
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
"""
_THREADS = """
import threading
def many(most):
    stop = threading.Event()
    started = []
    try:
        for _ in range(most):
            t = threading.Thread(target=stop.wait); t.start(); started.append(t)
        return True
    finally:
        stop.set()
        [t.join() for t in started]
"""
_HOARD = """
import mmap, os, time
def hoard(children, each, flags):
    reads, writes = os.pipe()
    for _ in range(children):
        if os.fork() == 0:
            m = mmap.mmap(-1, each, flags=flags)
            for at in range(0, each, 4096): m[at] = 1
            os.write(writes, b"x"); time.sleep(30); os._exit(0)
    held = 0
    while held < children: held += len(os.read(reads, 100))
    time.sleep(0.7)
    return True
"""
_SPIN = """
import os, time
def spin(seconds):
    while time.process_time() < seconds: pass
"""
_FILL = """
import os
def fill(total, each):
    for n in range(total // each):
        with open(f'f{n}', 'wb') as f: f.write(bytes(each))
    return True
"""
MIB = 1024 * 1024
_BOMBS = (
    Attack("processes", "fork", _FORK + "if many(200): print('ESCAPED')", control=_FORK + "if many(5): print('ALLOWED')", outside=True),
    Attack(
        "processes of processes",
        "fork",
        "import os, time\nr, w = os.pipe()\nfor _ in range(7): os.fork()\nos.write(w, b'x'); time.sleep(1)\n"
        "os.set_blocking(r, False)\nif len(os.read(r, 1000)) >= 128: os.write(1, b'ESCAPED\\n')\nos._exit(0)",
        control="import os, time\nr, w = os.pipe()\nfor _ in range(2): os.fork()\nos.write(w, b'x'); time.sleep(0.3)\n"
        "os.set_blocking(r, False)\nif len(os.read(r, 1000)) >= 4: os.write(1, b'ALLOWED\\n')\nos._exit(0)",
    ),
    Attack(
        "threads", "threads", _THREADS + "if many(200): print('ESCAPED')", control=_THREADS + "if many(5): print('ALLOWED')", outside=True
    ),
    Attack(
        "one large piece",
        "memory",
        f"x = bytearray({300 * MIB})\nprint('ESCAPED')",
        control=f"x = bytearray({20 * MIB})\nprint('ALLOWED')",
        outside=True,
    ),
    Attack(
        "address space",
        "memory",
        f"import mmap\nx = mmap.mmap(-1, {1024 * MIB})\nprint('ESCAPED')",
        outside=True,
        control=f"import mmap\nx = mmap.mmap(-1, {20 * MIB})\nprint('ALLOWED')",
    ),
    Attack(
        "many hoards",
        "memory",
        _HOARD + f"if hoard(8, {60 * MIB}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS): print('ESCAPED', flush=True)",
        control=_HOARD + f"if hoard(2, {10 * MIB}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS): print('ALLOWED', flush=True)",
    ),
    Attack(
        "many shared hoards",
        "memory",
        _HOARD + f"if hoard(8, {60 * MIB}, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS): print('ESCAPED', flush=True)",
        control=_HOARD + f"if hoard(2, {10 * MIB}, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS): print('ALLOWED', flush=True)",
    ),
    Attack(
        "files that are memory", "memory", "import os\nf = os.memfd_create('x')\nos.write(f, bytes(1000))\nprint('ESCAPED')", outside=True
    ),
    _kernel("shared memory segments", "memory", "call('shmget', 0, 4096, 0o1600) >= 0", outside=True),
    _kernel("message queues", "memory", "call('mq_open', ctypes.c_char_p(b'netra'), 0o102, 0o600, 0) >= 0"),
    Attack(
        "lock memory",
        "memory",
        _CALLS + f"b = ctypes.create_string_buffer({MIB})\nif libc.mlock(b, {MIB}) == 0: print('ESCAPED')",
        control=_WAY,
    ),
    Attack("spin", "cpu", _SPIN + "spin(2.0)\nprint('ESCAPED')", control=_SPIN + "spin(0.2)\nprint('ALLOWED')"),
    Attack(
        "spin in turns",
        "cpu",
        _SPIN + "for _ in range(5):\n    if (p := os.fork()) == 0: spin(0.5); os._exit(0)\n    os.waitpid(p, 0)\nprint('ESCAPED')",
        control=_SPIN + "if (p := os.fork()) == 0: spin(0.2); os._exit(0)\nos.waitpid(p, 0)\nprint('ALLOWED')",
    ),
    Attack("be preferred", "cpu", "import os\nos.nice(-5)\nprint('ESCAPED')", control="import os\nos.nice(1)\nprint('ALLOWED')"),
    Attack(
        "real time",
        "cpu",
        "import os\nos.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))\nprint('ESCAPED')",
        control="import os\nos.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))\nprint('ALLOWED')",
    ),
    Attack(
        "raise the limits",
        "cpu",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (100, 100))\nprint('ESCAPED')",
        control="import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nprint('ALLOWED')",
    ),
    Attack(
        "many files of some size",
        "disk",
        _FILL + f"if fill({48 * MIB}, {4 * MIB}): print('ESCAPED')",
        control=_FILL + f"if fill({8 * MIB}, {4 * MIB}): print('ALLOWED')",
        outside=True,
    ),
    Attack("one large file", "disk", _FILL + f"if fill({12 * MIB}, {12 * MIB}): print('ESCAPED')", outside=True),
    Attack("a sparse file", "disk", f"f = open('f', 'wb'); f.truncate({10**12})\nprint('ESCAPED')", outside=True),
    Attack(
        "space set aside",
        "disk",
        f"import os\nf = os.open('f', os.O_CREAT | os.O_RDWR)\nos.posix_fallocate(f, 0, {12 * MIB})\nprint('ESCAPED')",
        outside=True,
    ),
    Attack(
        "deleted and held open",
        "disk",
        f"import os\nheld = []\nfor n in range(12):\n    f = open('f', 'wb'); f.write(bytes({4 * MIB})); f.flush()\n"
        "    os.unlink('f'); held.append(f)\n"
        "print('ESCAPED')",
        outside=True,
    ),
    Attack(
        "the folder for what is temporary",
        "disk",
        f"import tempfile\nheld = []\nfor n in range(12):\n    f = tempfile.TemporaryFile(); f.write(bytes({4 * MIB})); f.flush()\n"
        "    held.append(f)\n"
        "print('ESCAPED')",
        outside=True,
    ),
    Attack(
        "many files",
        "inodes",
        "for n in range(500): open(f'f{n}', 'w').close()\nprint('ESCAPED')",
        control="for n in range(20): open(f'f{n}', 'w').close()\nprint('ALLOWED')",
        outside=True,
    ),
    Attack("many folders", "inodes", "import os\nfor n in range(500): os.mkdir(f'd{n}')\nprint('ESCAPED')", outside=True),
    Attack("many links", "inodes", "import os\nfor n in range(500): os.symlink('x', f'l{n}')\nprint('ESCAPED')", outside=True),
    Attack(
        "many open files",
        "descriptors",
        "held = [open('/dev/null') for _ in range(200)]\nprint('ESCAPED')",
        control="held = [open('/dev/null') for _ in range(20)]\nprint('ALLOWED')",
        outside=True,
    ),
    Attack(
        "a flood",
        "output",
        f"import os\nfor _ in range(64): os.write(1, bytes({MIB}))\nprint('\\nESCAPED')",
        control="import os\nos.write(1, bytes(1000))\nprint('\\nALLOWED')",
    ),
)

_REST = (
    Attack(
        "descriptors that were left open",
        "descriptors",
        "import os\nif len(os.listdir('/proc/self/fd')) > 4: print('ESCAPED')",
        control="import os\nf = open('/dev/null')\nif len(os.listdir('/proc/self/fd')) > 4: print('ALLOWED')",
    ),
    Attack(
        "write where the arguments come from",
        "descriptors",
        "import os\nf = os.open('/proc/self/fd/0', os.O_RDWR); os.pwrite(f, b'x', 0)\nprint('ESCAPED')",
        control="import os\nf = os.open('own', os.O_RDWR | os.O_CREAT); os.pwrite(f, b'x', 0)\nprint('ALLOWED')",
    ),
    _kernel("a user namespace", "namespaces", "call('unshare', 0x10000000) == 0", outside=True),
    _kernel("a network namespace", "namespaces", "call('unshare', 0x40000000) == 0"),
    _kernel("a mount namespace", "namespaces", "call('unshare', 0x20000) == 0"),
    Attack(
        "a namespace by a program",
        "namespaces",
        "import subprocess\nif subprocess.run(['unshare', '--user', 'true'], capture_output=True).returncode == 0: print('ESCAPED')",
        control="import subprocess\nif subprocess.run(['true'], capture_output=True).returncode == 0: print('ALLOWED')",
        outside=True,
    ),
    Attack(
        "a sandbox in the sandbox",
        "namespaces",
        "import subprocess\nif subprocess.run(['bwrap', '--ro-bind', '/', '/', 'true'], capture_output=True).returncode == 0: "
        "print('ESCAPED')",
        outside=True,
    ),
    _kernel("the namespaces of the first process", "namespaces", "call('setns', os.open('/proc/1/ns/mnt', os.O_RDONLY), 0) == 0"),
    Attack(
        "namespaces of outside", "namespaces", "import os\nif os.readlink(f'/proc/{outside_pid}/ns/net'): print('ESCAPED')", outside=True
    ),
    _kernel(
        "mount", "namespaces", "call('mount', ctypes.c_char_p(b't'), ctypes.c_char_p(b'/sandbox'), ctypes.c_char_p(b'tmpfs'), 0, 0) == 0"
    ),
    _kernel("mount anew, to write", "namespaces", "call('mount', 0, ctypes.c_char_p(b'/usr'), 0, 0x20 | 0x1000, 0) == 0"),
    _kernel("unmount", "namespaces", "call('umount2', ctypes.c_char_p(b'/usr'), 2) == 0"),
    _kernel("another root", "namespaces", "call('chroot', ctypes.c_char_p(b'/sandbox')) == 0"),
    _kernel("turn the root", "namespaces", "call('pivot_root', ctypes.c_char_p(b'.'), ctypes.c_char_p(b'.')) == 0"),
    _kernel("the new way to mount", "namespaces", "call('fsopen', ctypes.c_char_p(b'tmpfs'), 0) >= 0"),
    _kernel("a copy of a tree", "namespaces", "call('open_tree', -100, ctypes.c_char_p(b'/usr'), 1) >= 0"),
    _kernel("the ring", "io_uring", "call('io_uring_setup', 8, ctypes.create_string_buffer(120)) >= 0"),
    _kernel(
        "programs for the kernel",
        "kernel",
        "call('bpf', 0, ctypes.create_string_buffer(b'\\2\\0\\0\\0\\4\\0\\0\\0\\4\\0\\0\\0\\1', 120), 120) >= 0",
    ),
    _kernel("counters", "kernel", "call('perf_event_open', ctypes.create_string_buffer(120), 0, -1, -1, 0) >= 0"),
    _kernel("faults of pages", "kernel", "call('userfaultfd', 1) >= 0"),
    _kernel("keys", "kernel", "call('add_key', ctypes.c_char_p(b'user'), ctypes.c_char_p(b'netra'), ctypes.c_char_p(b'x'), 1, -2) >= 0"),
    _kernel("the keyring of the session", "kernel", "call('keyctl', 0, -3, 0) >= 0"),
    _kernel("modules", "kernel", "call('init_module', ctypes.create_string_buffer(8), 8, ctypes.c_char_p(b'')) == 0"),
    _kernel("another kernel", "kernel", "call('kexec_load', 0, 0, 0, 0) == 0"),
    _kernel("the name of the machine", "kernel", "call('sethostname', ctypes.c_char_p(b'x'), 1) == 0"),
    _kernel("the clock", "kernel", "call('settimeofday', ctypes.create_string_buffer(16), 0) == 0"),
    _kernel("memory laid out as it pleases", "kernel", "call('personality', 0x0040000) >= 0"),
    _kernel("the log of the kernel", "kernel", "call('syslog', 3, ctypes.create_string_buffer(4096), 4096) > 0"),
    _kernel(
        "a file by its number",
        "files",
        "(lambda h, m: call('name_to_handle_at', -100, ctypes.c_char_p(b'/usr'), h, m, 0) == 0)"
        "(ctypes.create_string_buffer(b'\\x80', 200), ctypes.c_int())",
    ),
    _kernel("old segments", "kernel", "call('modify_ldt', 0, ctypes.create_string_buffer(16), 16) >= 0"),
    _kernel("watch all files", "kernel", "call('fanotify_init', 0, 0) >= 0"),
    Attack(
        "be root", "execution", "import os\nos.setuid(0)\nprint('ESCAPED')", control="import os\nos.setuid(os.getuid())\nprint('ALLOWED')"
    ),
    Attack(
        "any capability",
        "execution",
        "s = open('/proc/self/status').read()\nif any(int(l.split()[1], 16) for l in s.splitlines() if l.startswith(('CapEff', 'CapPrm', "
        "'CapBnd', 'CapInh', 'CapAmb'))): print('ESCAPED')",
        outside=True,
    ),
    Attack(
        "programs that make root",
        "execution",
        "s = open('/proc/self/status').read()\nif 'NoNewPrivs:\\t0' in s: print('ESCAPED')",
        outside=True,
    ),
    Attack(
        "without a filter", "execution", "s = open('/proc/self/status').read()\nif 'Seccomp:\\t2' not in s: print('ESCAPED')", outside=True
    ),
    Attack(
        "the starter's terminal",
        "execution",
        "import fcntl, os\nfor c in b'id\\n': fcntl.ioctl(0, 0x5412, bytes([c]))\nprint('ESCAPED')",
        control="import fcntl\nif fcntl.ioctl(open('/proc/self/stat'), 0x541b, bytes(4)) is not None: print('ALLOWED')",
    ),
    Attack(
        "what a call left in files",
        "leftovers",
        "import os\nplaces = ('/sandbox/left', '/tmp/left', '/var/tmp/left', '/dev/shm/left', '/run/left', '/sandbox/../left')\n"
        "if any(map(os.path.exists, places)): print('ESCAPED')\n"
        "for p in places:\n    try: open(p, 'w').close()\n    except OSError: pass",
        control="import os\nopen('/sandbox/left', 'w').close()\nif os.path.exists('/sandbox/left'): print('ALLOWED')",
    ),
    Attack(
        "what a call left listening",
        "leftovers",
        "import socket, os, time\ns = socket.socket(socket.AF_UNIX)\ntry: s.connect('\\0left'); print('ESCAPED')\nexcept OSError: pass\n"
        "if os.fork() == 0:\n    t = socket.socket(socket.AF_UNIX); t.bind('\\0left'); t.listen(); os.setsid(); time.sleep(20)",
        control="import socket\nt = socket.socket(socket.AF_UNIX); t.bind('\\0left'); t.listen()\ns = socket.socket(socket.AF_UNIX)\n"
        "s.connect('\\0left'); print('ALLOWED')",
    ),
    Attack(
        "a daemon",
        "daemons",
        "import os, sys, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        os.closerange(0, 3); os.execvp('sh', ['sh', '-c', 'sleep 30; true', mark])\n    os._exit(0)\ntime.sleep(0.2)",
        control="import os\nif (p := os.fork()) == 0:\n    os.setsid(); os._exit(0)\nif os.waitpid(p, 0)[1] == 0: print('ALLOWED')",
    ),
    Attack(
        "a daemon that hears no signals",
        "daemons",
        "import os, signal, time\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "if os.fork() == 0:\n    os.setsid(); open('/proc/self/comm', 'w').write(mark); os.closerange(0, 3); time.sleep(30)\n"
        "time.sleep(0.1)",
        control="import os, signal\nsignal.signal(15, signal.SIG_IGN)\nos.kill(os.getpid(), 15)\nprint('ALLOWED')",
    ),
)

ATTACKS = (*_FILES, *_OTHERS, *_NET, *_BOMBS, *_REST)

PROGRAM = """
import json, os, sys, traceback
facts = json.loads(sys.stdin.read())
code = facts.pop("code")
globals().update(facts)
try:
    exec(code)
except BaseException:
    traceback.print_exc()
sys.stdout.flush()
os._exit(0)
"""

# each in a process and a folder of its own, one after another
PROGRAM_OF_MANY = """
import json, os, sys, traceback
facts = json.loads(sys.stdin.read())
codes, printed = facts.pop("codes"), []
for number, code in enumerate(codes):
    reads, writes = os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(writes, 1), os.dup2(writes, 2)
        os.closerange(3, 64)
        os.mkdir(f"of-{number}"), os.chdir(f"of-{number}")
        try:
            exec(code, dict(facts, __name__="__main__"))
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(0)
    os.close(writes)
    os.waitpid(child, 0)
    os.set_blocking(reads, False)
    try:
        printed.append(os.read(reads, 65536).decode(errors="replace"))
    except BlockingIOError:
        printed.append("still running")
    os.close(reads)
print(json.dumps(printed))
"""
