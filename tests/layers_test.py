#!/usr/bin/env python3
"""Folders are layers and includes go one way; this checks every #include of ours, and who may see which library.

Usage: layers_test.py SOURCE_ROOT
"""
import pathlib
import re
import sys

# What each layer may include, besides itself.
ALLOWED = {
    "core/base": [],
    "core/cache": ["core/base"],
    "core/policy": ["core/base", "core/cache"],
    "core/task": ["core/base"],
    "core/ops": ["core/base", "core/cache"],
    "core/model": ["core/base", "core/cache", "core/ops"],
    "core/engine": ["core/base", "core/cache", "core/policy", "core/ops", "core/model"],
    "kernels": ["core"],
    "trace": ["core"],
    "replay": ["core", "trace"],
    "gui": ["core", "trace", "replay"],
    "cli": ["core", "kernels", "trace", "replay", "gui"],
}
# Libraries that only some layers may see.
LIBRARIES = {
    r"sqlite3\.h": ["trace"],
    r"imgui|implot|GLFW": ["gui"],
    r"nlohmann/": ["core/model", "cli", "trace", "replay", "gui"],
    r"pcre2": ["core/model", "gui"],
    r"cuda|cublas|cupti": ["kernels", "trace/cupti"],
    r"CLI/CLI": ["cli"],
}


def layer_of(path):
    return next((layer for layer in ALLOWED if path == layer or path.startswith(layer + "/")), None)


def main(root):
    errors = []
    files = [f for top in ("core", "kernels", "trace", "replay", "gui", "cli") for f in (root / top).rglob("*")
             if f.suffix in (".h", ".cpp", ".cu", ".cuh")]
    for file in files:
        path = file.relative_to(root).as_posix()
        layer = layer_of(path)
        if layer is None:
            errors.append(f"{path}: belongs to no layer; add its folder to layers_test.py")
            continue
        for number, line in enumerate(file.read_text().splitlines(), 1):
            match = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line)
            if not match:
                continue
            include = match.group(1)
            target = layer_of(include)
            if target and target != layer and not any(target == a or target.startswith(a + "/") for a in ALLOWED[layer]):
                errors.append(f"{path}:{number}: {layer} may not include {include}")
            for pattern, where in LIBRARIES.items():
                if re.search(pattern, include) and target is None and not any(path.startswith(w + "/") for w in where):
                    errors.append(f"{path}:{number}: <{include}> may only be included in {', '.join(where)}")
    # Every policy file has its registry line.
    registry = (root / "core/policy/registry.cpp").read_text()
    for file in (root / "core/policy/policies").glob("*.cpp"):
        makers = re.findall(r"^std::unique_ptr<Policy> (make_\w+)\(", file.read_text(), re.M)
        if not makers:
            errors.append(f"core/policy/policies/{file.name}: defines no make_<name>(PolicyInfo)")
        errors += [f"{file.name}: {m} has no line in core/policy/registry.cpp" for m in makers if m not in registry]
    # Every subcommand has its line in main.cpp.
    main_cpp = (root / "cli/main.cpp").read_text()
    for file in (root / "cli").glob("*.cpp"):
        for maker in re.findall(r"^void (add_\w+)\(CLI::App& app, Context& context\) \{", file.read_text(), re.M):
            if f"{maker}(app, context)" not in main_cpp:
                errors.append(f"{file.name}: {maker} has no line in cli/main.cpp")
    print("\n".join(errors) or f"{len(files)} files keep to their layers")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
