//! Checks whether a command is a program in the sandbox, before anything starts.
//!
//! Guarantees: a program that is reported as missing is missing for the agent too, whatever links lead to it. For a script, the interpreter
//! is checked as well. Nothing is started, and nothing but the first line of the program is read.
//!
//! Non-goals: the libraries that a program needs, and changes before the agent starts.

use std::{
    collections::VecDeque,
    fs,
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::{Component, Path, PathBuf},
};

/// The maximum number of symbolic links on one path, as in the kernel.
const LINKS: usize = 40;
/// The maximum length of a script's first line that the kernel reads, in bytes.
const FIRST_LINE: usize = 256;

/// The files of this machine that a sandbox shows.
#[derive(Clone, Debug, Default)]
pub struct Shown {
    /// Pairs of a path in the sandbox and the path on this machine that is mounted there. A longer path covers a shorter one.
    pub binds: Vec<(PathBuf, PathBuf)>,
    /// Paths whose content is unknown before the agent starts.
    pub unknown: Vec<PathBuf>,
    /// The working folder.
    pub cwd: PathBuf,
    /// The sandbox's `PATH`.
    pub path: String,
}

/// Why a command is not a program.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Missing {
    /// Nothing is at this path, although the sandbox shows it.
    Nothing(PathBuf),
    /// The sandbox does not show this path.
    Unshown(PathBuf),
    /// The file cannot be executed. The text says what it is.
    NoProgram(&'static str),
    /// The links form a loop.
    Circle,
}

impl Shown {
    /// Returns what is wrong with a command, for the user, or `None` if it is a program.
    pub fn wrong(&self, command: &str) -> Option<String> {
        let found = match self.find(command) {
            Ok(found) => found?,
            Err(said) => return Some(said),
        };
        let interpreter = self.interpreter(&found)?;
        let said = self.find(&interpreter).err()?;
        Some(format!("`{command}`, a script that is to be run by {said}"))
    }

    /// Returns the file of this machine that a command runs, or `None` if that is unknown.
    fn find(&self, command: &str) -> Result<Option<PathBuf>, String> {
        if command.contains('/') {
            let place = self.cwd.join(command);
            return self.program(&place).map_err(|missing| self.told(command, &place, &missing));
        }
        let mut others = Vec::new();
        for folder in self.path.split(':').filter(|folder| folder.starts_with('/')) {
            let place = Path::new(folder).join(command);
            match self.program(&place) {
                Ok(found) => return Ok(found),
                Err(Missing::Nothing(_)) => {}
                Err(Missing::Unshown(_)) if !place.exists() => {}
                Err(missing) => others.push((place, missing)),
            }
        }
        if let Some((place, missing)) = others.first() {
            return Err(self.told(command, place, missing));
        }
        let outside =
            std::env::var_os("PATH").into_iter().flat_map(|path| std::env::split_paths(&path).collect::<Vec<_>>());
        let outside = outside.map(|folder| folder.join(command)).find(|file| file.is_file());
        let here = outside
            .map(|file| format!("; {} is not shown: {}", file.display(), self.advice(&file)))
            .unwrap_or_default();
        Err(format!("`{command}`, which is in none of the sandbox's {}{here}", self.path))
    }

    /// Resolves a path in the sandbox to a program of this machine.
    fn program(&self, place: &Path) -> Result<Option<PathBuf>, Missing> {
        let Some(file) = self.follow(place)? else { return Ok(None) };
        let is = fs::metadata(&file).map_err(|_| Missing::Nothing(place.to_owned()))?;
        match is.permissions().mode() & 0o111 {
            _ if is.is_dir() => Err(Missing::NoProgram("a folder")),
            0 => Err(Missing::NoProgram("a file without the right to be run (chmod +x)")),
            _ => Ok(Some(file)),
        }
    }

    /// Resolves a path in the sandbox to a file of this machine, with the links as the sandbox sees them.
    fn follow(&self, place: &Path) -> Result<Option<PathBuf>, Missing> {
        let mut rest: VecDeque<PathBuf> = parts(place);
        let mut at = PathBuf::from("/");
        let mut links = 0;
        while let Some(part) = rest.pop_front() {
            if part == Path::new("..") {
                at.pop();
                continue;
            }
            let next = at.join(part);
            if self.unknown.contains(&next) {
                return Ok(None);
            }
            let Some(file) = self.on_this_machine(&next) else {
                // The folder exists because a bind below it does.
                if self.binds.iter().any(|(to, _)| to.starts_with(&next)) {
                    at = next;
                    continue;
                }
                return Err(Missing::Unshown(next.join(rest.into_iter().collect::<PathBuf>())));
            };
            let is = match fs::symlink_metadata(&file) {
                Ok(is) => is,
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
                Err(_) => return Err(Missing::Nothing(next)),
            };
            let target = if is.is_symlink() { fs::read_link(&file).ok() } else { None };
            let Some(target) = target else {
                at = next;
                continue;
            };
            links += 1;
            if links > LINKS {
                return Err(Missing::Circle);
            }
            if target.is_absolute() {
                at = PathBuf::from("/");
            }
            parts(&target).into_iter().rev().for_each(|part| rest.push_front(part));
        }
        Ok(self.on_this_machine(&at))
    }

    fn on_this_machine(&self, place: &Path) -> Option<PathBuf> {
        let within = self.binds.iter().filter(|(to, _)| place.starts_with(to));
        let (to, from) = within.max_by_key(|(to, _)| to.components().count())?;
        let below = place.strip_prefix(to).ok()?;
        Some(if below.as_os_str().is_empty() { from.clone() } else { from.join(below) })
    }

    /// Returns the interpreter of a script, from its first line.
    fn interpreter(&self, script: &Path) -> Option<String> {
        let mut first = Vec::new();
        let file = fs::File::open(script).ok()?;
        file.take(u64::try_from(FIRST_LINE).unwrap_or_default()).read_to_end(&mut first).ok()?;
        let line = first.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
        let line = std::str::from_utf8(line).ok()?.trim();
        let mut words = line.split_whitespace();
        let program = words.next()?.to_owned();
        // `env` looks up the program on the sandbox's PATH.
        let looks = program.ends_with("/env");
        let named = words.find(|word| !word.starts_with('-') && !word.contains('='));
        Some(named.filter(|_| looks).map_or(program, str::to_owned))
    }

    fn told(&self, command: &str, place: &Path, missing: &Missing) -> String {
        let file = self.on_this_machine(place);
        let is_link = file.as_ref().and_then(|file| fs::read_link(file).ok());
        match missing {
            Missing::Nothing(at) if is_link.is_some() => {
                format!("`{command}`, a link to {}, where nothing is", at.display())
            }
            Missing::Nothing(at) => {
                let here = self.on_this_machine(at).map(|file| format!(" ({} on this machine)", file.display()));
                format!("`{command}`, and nothing at {}{}", at.display(), here.unwrap_or_default())
            }
            Missing::Unshown(at) => {
                let what = match (at == place, is_link) {
                    (true, _) => String::new(),
                    (false, Some(_)) => format!(", a link to {}", at.display()),
                    (false, None) => format!(", which leads to {}", at.display()),
                };
                // The end of the chain of links matters: those in between may be links again.
                let end = fs::canonicalize(at).unwrap_or_else(|_| at.clone());
                let mut advice = self.advice(at);
                if self.on_this_machine(&end).is_none() && folder_of(&end) != folder_of(at) {
                    advice = format!("{advice} --ro {}", folder_of(&end).display());
                }
                if end.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python")) {
                    advice.push_str(", or have a Python that it shows make the environment: /usr/bin/python3 -m venv");
                }
                format!("`{command}`{what}, which the sandbox does not show: {advice}")
            }
            Missing::NoProgram(what) => format!("`{command}`, {what}"),
            Missing::Circle => format!("`{command}`, a link that leads in a circle"),
        }
    }

    fn advice(&self, file: &Path) -> String {
        format!("add --ro {}", folder_of(file).display())
    }
}

/// Returns the folder that a program needs to be shown: the parent of a `bin` folder, because libraries lie beside it.
fn folder_of(file: &Path) -> PathBuf {
    let folder = file.parent().unwrap_or(file);
    let whole = folder.parent().filter(|_| folder.ends_with("bin")).filter(|whole| whole.parent().is_some());
    whole.unwrap_or(folder).to_owned()
}

fn parts(path: &Path) -> VecDeque<PathBuf> {
    let part = |component| match component {
        Component::Normal(name) => Some(PathBuf::from(name)),
        Component::ParentDir => Some(PathBuf::from("..")),
        _ => None,
    };
    path.components().filter_map(part).collect()
}

#[cfg(test)]
mod tests;
