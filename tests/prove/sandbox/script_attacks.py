"""What a script may try: Python for the Monty interpreter, most of which CPython, outside, lets through; pure."""

from __future__ import annotations

from tests.prove.sandbox.attack import Attack, Family

_MIB = 1024 * 1024
_SAY = "\nprint('ESCAPED')"
_WORKS = "print('ALLOWED')"


def _tried(name: str, family: Family, code: str, control: str = "") -> Attack:
    """Something that raises unless it gets through; outside it does, or its twin is allowed."""
    return Attack(name, family, code + _SAY, control=control + "\n" + _WORKS if control else "", outside=not control)


def _asked(name: str, family: Family, code: str, control: str = "") -> Attack:
    """Something whose last line is a condition: true when it got through."""
    *lines, condition = code.split("\n")
    return Attack(name, family, "\n".join([*lines, f"if {condition}: print('ESCAPED')"]), control=control, outside=not control)


_FILES = (
    _asked("read", "files", "canary in open(secret_file).read()"),
    _asked("read bytes", "files", "canary.encode() in open(secret_file, 'rb').read()"),
    _asked("read through pathlib", "files", "from pathlib import Path\ncanary in Path(secret_file).read_text()"),
    _asked("read up and away", "files", "canary in open('../' * 30 + secret_file).read()"),
    _asked("read through a strange path", "files", "canary in open('/./' + secret_file.replace('/', '//')).read()"),
    _asked("list", "files", "import os\n'secret.txt' in os.listdir(outside_folder)"),
    _asked("list the root", "files", "import os\n'etc' in os.listdir('/')"),
    _asked("look", "files", "import os\nos.path.exists(secret_file)"),
    _asked("measure", "files", "import os\nos.stat(secret_file).st_size > 0"),
    _asked("find the way", "files", "import os\nos.path.realpath('/proc/self/exe').startswith('/') and os.path.exists('/proc/self/exe')"),
    _asked("iterate", "files", "from pathlib import Path\nany('secret' in p.name for p in Path(outside_folder).iterdir())"),
    _asked("the passwords", "files", "'root' in open('/etc/passwd').read()"),
    _tried("write", "files", "open(secret_file, 'w').write('x')", "x = 'x'"),
    _tried(
        "write through pathlib",
        "files",
        "from pathlib import Path\nPath(secret_file).write_text('x')",
        "from pathlib import Path\nPath('a')",
    ),
    _tried("append", "files", "open(secret_file, 'a').write('x')", "x = 'x'"),
    _tried("create", "files", "open(outside_folder + '/new', 'x').write('x')", "x = 'x'"),
    _tried("create here", "disk", "open('new', 'w').write('x')"),
    _tried("make a folder", "inodes", "from pathlib import Path\nPath('new').mkdir()"),
    _tried("delete", "files", "import os\nos.remove(secret_file)", "import os\nos.path.join('a', 'b')"),
    _tried("unlink", "files", "from pathlib import Path\nPath(secret_file).unlink()", "from pathlib import Path\nPath('a')"),
    _tried("rename", "files", "import os\nos.rename(secret_file, secret_file + '2')", "import os\nos.path.join('a', 'b')"),
    _tried("a link", "links", "import os\nos.symlink(secret_file, 'l')"),
    _tried("a hard link", "links", "import os\nos.link('/proc/self/exe' if False else __file__, 'h')", "x = __file__"),
    _asked("another call's file", "workspaces", "canary in open(other_folder + '/theirs.txt').read()"),
    _asked("all folders of calls", "workspaces", "import os\nlen(os.listdir(os.path.dirname(other_folder))) > 0"),
    _tried("into another call's folder", "workspaces", "open(other_folder + '/mine', 'w').write('x')", "x = 'x'"),
    _tried("stay elsewhere", "workspaces", "import os\nos.chdir(other_folder)\nassert canary in open('theirs.txt').read()"),
    _asked("its own memory", "memory of others", "len(open('/proc/self/maps').read()) > 0"),
    _asked(
        "the memory of a process",
        "memory of others",
        "open(f'/proc/{victim_pid}/mem', 'rb').read(0) == b''",
        "if isinstance(victim_address, int): print('ALLOWED')",
    ),
    _asked("processes", "proc", "import os\nstr(victim_pid) in os.listdir('/proc')"),
    _asked("command lines", "proc", "len(open(f'/proc/{victim_pid}/cmdline').read()) > 0"),
    _asked("the environment of the starter", "environment", "len(open('/proc/self/environ').read()) > 0"),
    _asked("the environment", "environment", "import os\nlen(os.environ) > 0"),
    _asked("one of the environment", "environment", "import os\nos.getenv('PATH') is not None"),
    _asked("where it runs", "environment", "import os\nos.getcwd() not in ('/sandbox', '/')"),
    _asked("on what it runs", "environment", "import platform\nplatform.node() != ''"),
    _tried("which process", "proc", "import os\nos.getpid()"),
    _tried("a signal", "signals", "import os\nos.kill(victim_pid, 0)"),
    _tried("a signal of the module", "signals", "import signal\nsignal.pidfd_send_signal"),
    _tried("trace", "ptrace", "import ctypes\nctypes.CDLL(None).ptrace"),
    _tried("a socket", "tcp", "import socket\nsocket.create_connection(('127.0.0.1', tcp_port), 2)"),
    _tried("a socket of the C module", "tcp", "import _socket\n_socket.socket()"),
    _tried("a stream", "tcp", "import asyncio\nasync def f():\n    await asyncio.open_connection('127.0.0.1', tcp_port)\nasyncio.run(f())"),
    _tried("a page", "tcp", "import urllib.request\nurllib.request.Request('http://127.0.0.1')"),
    _tried("a connection", "tcp", "import http.client\nhttp.client.HTTPConnection('127.0.0.1', tcp_port).connect()"),
    _tried("a datagram", "udp", "import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', udp_port))"),
    _tried("a name", "dns", "import socket\nsocket.getaddrinfo('127.0.0.1', 80)"),
    _tried("a socket by its path", "sockets", "import socket\nsocket.socket(socket.AF_UNIX).connect(socket_path)"),
    _tried("an abstract socket", "sockets", "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0' + socket_name)"),
    _tried("open a socket as a file", "sockets", "open(f'/dev/tcp/127.0.0.1/{tcp_port}')", "x = f'/dev/tcp/127.0.0.1/{tcp_port}'"),
)

_PROCESSES = (
    _tried("fork", "fork", "import os\nif os.fork() == 0: os._exit(0)"),
    _tried("a program", "fork", "import subprocess\nsubprocess.run(['true'])"),
    _tried("a program of the shell", "fork", "import os\nos.system('true')"),
    _tried("become a program", "execution", "import os\nos.execv"),
    _tried("a pool", "fork", "import multiprocessing\nmultiprocessing.get_context"),
    _tried("a thread", "threads", "import threading\nthreading.Thread(target=print).start()"),
    _tried("a thread of the C module", "threads", "import _thread\n_thread.start_new_thread(print, ())"),
    _tried("threads of a pool", "threads", "import concurrent.futures\nconcurrent.futures.ThreadPoolExecutor(1).submit(int).result()"),
    _tried("a thread of the loop", "threads", "import asyncio\nasyncio.run(asyncio.to_thread(int))"),
    _tried("a descriptor", "descriptors", "import os\nos.read(0, 0)"),
    _tried("a descriptor as a file", "descriptors", "open(1, 'w', closefd=False)"),
    _tried("a descriptor by its path", "descriptors", "open('/proc/self/fd/1', 'w')", "x = '/proc/self/fd/1'"),
    _tried("duplicate", "descriptors", "import os\nos.dup(1)"),
    _tried("call C", "kernel", "import ctypes\nctypes.CDLL(None).getpid()"),
    _tried("call C through another", "kernel", "import _ctypes\n_ctypes.dlopen"),
    _tried("map memory", "kernel", "import mmap\nmmap.mmap(-1, 4096)"),
    _tried("limits", "kernel", "import resource\nresource.getrlimit(0)"),
    _tried("leave the namespace", "namespaces", "import os\nos.readlink('/proc/self/ns/net')"),
    _tried("a ring", "io_uring", "import ctypes\nctypes.CDLL(None).syscall(425, 8, 0)"),
)

_LANGUAGE = (
    _asked("all classes", "execution", "len(object.__subclasses__()) > 0"),
    _asked("all classes, from a tuple", "execution", "len(().__class__.__bases__[0].__subclasses__()) > 0"),
    _asked("all classes, by name", "execution", "len(getattr(getattr((), '__cl' + 'ass__'), '__ba' + 'se__').__subclasses__()) > 0"),
    _asked("through a format", "execution", "'{0.__class__.__mro__}'.format(()) != ''"),
    _asked("the globals of a function", "execution", "def f(): pass\n'print' in str(f.__globals__['__builtins__'])"),
    _asked("the builtins", "execution", "__builtins__ is not None"),
    _asked("the builtins as a module", "execution", "import builtins\nbuiltins.open is not None"),
    _asked("import by name", "execution", "__import__('subprocess') is not None"),
    _asked("import by its library", "execution", "import importlib\nimportlib.import_module('subprocess') is not None"),
    _asked("all modules", "execution", "import sys\n'os' in sys.modules"),
    _asked("evaluate an import", "execution", "eval(\"__import__('subprocess')\") is not None"),
    _tried("execute an import", "execution", "exec('import subprocess')"),
    _tried("execute with other builtins", "execution", "exec('import subprocess', {'__builtins__': {}} if False else {})"),
    _asked("compile", "execution", "compile('1', 'x', 'eval') is not None"),
    _asked("code of its own", "execution", "def f(): pass\nf.__code__.replace(co_consts=(1,)) is not None"),
    _asked("a frame", "execution", "import sys\nsys._getframe() is not None"),
    _asked(
        "a frame of an error",
        "execution",
        "def f():\n    try:\n        1 / 0\n    except Exception as e:\n        return e.__traceback__.tb_frame\nf() is not None",
    ),
    _asked("a frame of a generator", "execution", "def g():\n    yield 1\ng().gi_frame is not None"),
    _asked("unpickle", "execution", "import pickle\npickle.loads(pickle.dumps(print)) is print"),
    _asked("marshal", "execution", "import marshal\nmarshal.dumps(1) != b''"),
    _asked("all objects", "execution", "import gc\nlen(gc.get_objects()) > 0"),
    _asked("the source of others", "execution", "import inspect, os\ninspect.getsource(os) != ''"),
    _asked("a breakpoint", "execution", "callable(breakpoint)"),
    _asked("its input", "execution", "callable(input)"),
    _asked("change a type", "execution", "class A: pass\ntype('B', (A,), {'x': 1}).x == 1"),
    _tried("the host's functions", "execution", "from os import _handler", "from os import path"),
)

_BOMBS = (
    _tried("a list without an end", "memory", "x = []\nfor _ in range(10 ** 7): x.append('a' * 100)", "x = ['a'] * 100"),
    _tried("a long text", "memory", f"x = 'a' * {400 * _MIB}", "x = 'a' * 1000"),
    _tried("a text that doubles", "memory", "x = 'a'\nfor _ in range(29): x += x", "x = 'a'\nfor _ in range(9): x += x"),
    _tried("bytes", "memory", f"x = bytes({400 * _MIB})", "x = bytes(1000)"),
    _tried("a large number", "memory", "x = 1 << (8 * 400 * 1024 * 1024)", "x = 1 << 800"),
    _tried("a larger number", "memory", "x = 10 ** (10 ** 9)", "x = 10 ** 10"),
    _tried("a table", "memory", "x = {n: str(n) * 20 for n in range(10 ** 7)}", "x = {n: str(n) for n in range(10)}"),
    _tried("lists of lists", "memory", "x = [[0] * 1000 for _ in range(10 ** 6)]", "x = [[0] * 10 for _ in range(10)]"),
    _tried("fill", "memory", "x = 'a'.ljust(4 * 10 ** 8)", "x = 'a'.ljust(10)"),
    _tried("a format", "memory", "x = f'{1:>400000000}'", "x = f'{1:>4}'"),
    _tried("replace", "memory", "x = ('a' * 10 ** 6).replace('a', 'b' * 400)", "x = 'a'.replace('a', 'b')"),
    _tried("join", "memory", "x = ('b' * 400).join(['a'] * 10 ** 6)", "x = 'b'.join(['a'] * 10)"),
    _tried("a set", "memory", "x = set(range(3 * 10 ** 7))", "x = set(range(30))"),
    _tried(
        "no end of calls",
        "memory",
        "def f(n):\n    return f(n + 1) if n < 10 ** 6 else n\nf(0)",
        "def f(n):\n    return f(n + 1) if n < 10 else n\nf(0)",
    ),
    _tried("deep text", "memory", "import json\njson.loads('[' * 10 ** 6)", "import json\njson.loads('[[]]')"),
    _tried("deep code", "memory", "eval('(' * 10 ** 5 + '1' + ')' * 10 ** 5)", "eval('((1))')"),
    _tried("spin", "cpu", "n = 0\nwhile n < 10 ** 10: n += 1", "n = 0\nwhile n < 10 ** 3: n += 1"),
    _tried("spin inside", "cpu", "x = sum(range(10 ** 12))", "x = sum(range(10))"),
    _tried(
        "spin and catch", "cpu", "n = 0\nwhile n < 10 ** 10:\n    try:\n        n += 1\n    except BaseException:\n        pass", "x = 1"
    ),
    _tried("spin in the end", "cpu", "try:\n    while True: pass\nfinally:\n    pass", "try:\n    pass\nfinally:\n    pass"),
    _tried(
        "a pattern that looks back",
        "cpu",
        "import re\nre.match(r'(a|a|aa)*(a|aa)+$(?!x)', 'a' * 200 + 'b' * 3) or [0 for _ in range(10 ** 11)]",
        "import re\nre.match('a', 'a')",
    ),
    _tried("a long division", "cpu", "x = 3 ** 3000000\nfor _ in range(10 ** 5): y = x // 7 ** 100000", "x = 3 ** 30 // 7"),
    _tried("sort", "cpu", "x = list(range(2 * 10 ** 5))\nfor _ in range(10 ** 6): x.sort(key=lambda v: -v)", "x = sorted([2, 1])"),
    _tried("compare", "cpu", "x = [0] * 10 ** 5\nfor _ in range(10 ** 6): x == x.copy()", "x = [0] == [0]"),
    _tried("sleep", "cpu", "import time\ntime.sleep(60)", "import time\ntime.sleep(0.01)"),
    _tried("a flood", "output", "for _ in range(10 ** 7): print('a' * 100)", "print('a')"),
    _tried("one long line", "output", "print('a' * 10 ** 8)\n[print(n) for n in range(10 ** 9)]", "print('a' * 100)"),
)

_LEFT = (
    Attack(
        "a variable",
        "leftovers",
        "try:\n    left\n    print('ESCAPED')\nexcept NameError:\n    left = canary",
        control="left = 1\nif left: print('ALLOWED')",
    ),
    Attack(
        "another's argument",
        "leftovers",
        "try:\n    print('ESCAPED' if hidden else '')\nexcept NameError:\n    pass\nhidden = canary",
        control="hidden = canary\nif hidden: print('ALLOWED')",
    ),
    Attack(
        "a builtin",
        "leftovers",
        "if len([1, 2]) == 99: print('ESCAPED')\nlen = lambda x: 99",
        control="len = lambda x: 99\nif len([]) == 99: print('ALLOWED')",
    ),
    Attack(
        "an attribute of a module",
        "leftovers",
        "import json\ntry:\n    if json.left: print('ESCAPED')\nexcept AttributeError: pass\n"
        "try:\n    json.left = canary\nexcept AttributeError: pass",
        control="class A: pass\nA.left = canary\nif A.left: print('ALLOWED')",
    ),
    Attack(
        "a function of a module",
        "leftovers",
        "import json\nif json.dumps(1) == 'left': print('ESCAPED')\ntry:\n    json.dumps = lambda x: 'left'\nexcept AttributeError: pass",
        control="import json\nif json.dumps(1) == '1': print('ALLOWED')",
    ),
    Attack(
        "a list of a module",
        "leftovers",
        "import sys\nif 'left' in sys.argv: print('ESCAPED')\ntry:\n    sys.argv.append('left')\nexcept AttributeError: pass",
        control="x = []\nx.append('left')\nif 'left' in x: print('ALLOWED')",
    ),
    Attack(
        "an attribute of a type",
        "leftovers",
        "try:\n    if str.left: print('ESCAPED')\nexcept AttributeError: pass\ntry:\n    str.left = canary\nexcept Exception: pass",
        control="class A: pass\nA.left = 1\nif A.left: print('ALLOWED')",
    ),
    Attack(
        "the state of chance",
        "leftovers",
        "import random\nif random.random() == 0.5714025946899135: print('ESCAPED')\nrandom.seed(10)",
        control="import random\nrandom.seed(10)\na = random.random()\nrandom.seed(10)\nif a == random.random(): print('ALLOWED')",
    ),
    Attack(
        "the folder",
        "leftovers",
        "import os\nif os.getcwd() == '/left': print('ESCAPED')\ntry:\n    os.chdir('/left')\nexcept OSError: pass",
        control="import os\nif os.getcwd(): print('ALLOWED')",
    ),
    Attack(
        "the environment",
        "leftovers",
        "import os\ntry:\n    if os.getenv('left'): print('ESCAPED')\n    os.environ['left'] = canary\nexcept "
        "(RuntimeError, KeyError, TypeError, AttributeError): pass",
        control="x = {}\nx['left'] = 1\nif x['left']: print('ALLOWED')",
    ),
    Attack(
        "a task",
        "daemons",
        "import asyncio\nasync def f():\n    while True: await asyncio.sleep(0.01)\nasync def main():\n    asyncio.create_task(f())\n"
        "asyncio.run(main())",
        control="import asyncio\nasync def f():\n    await asyncio.sleep(0)\nasyncio.run(f())\nprint('ALLOWED')",
    ),
)

ATTACKS = (*_FILES, *_PROCESSES, *_LANGUAGE, *_BOMBS, *_LEFT)
