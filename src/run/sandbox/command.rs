//! Whether a command is a program in the sandbox, looked at before anything starts.
//!
//! Guarantees: what is said to be missing is not there for the agent either, whichever links lead to it, and for a script whoever is to run it is
//! looked for as well; nothing is started, and no file is read but the first line of the program.
//! Non-goals: libraries that a program needs, and what changes before the agent starts.

use std::{
    collections::VecDeque,
    fs,
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::{Component, Path, PathBuf},
};

/// Links that one path may lead through, as the kernel has it.
const LINKS: usize = 40;
/// Longest first line of a script that the kernel reads.
const FIRST_LINE: usize = 256;

/// What a sandbox shows of this machine's files.
#[derive(Clone, Debug, Default)]
pub struct Shown {
    /// A place in the sandbox, and what of this machine is there. A longer place covers a shorter one.
    pub binds: Vec<(PathBuf, PathBuf)>,
    /// Places of which nothing is known before the agent starts.
    pub unknown: Vec<PathBuf>,
    /// The working folder.
    pub cwd: PathBuf,
    /// Where programs are looked for.
    pub path: String,
}

/// Why there is no program.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Missing {
    /// Nothing is at this place, which is shown.
    Nothing(PathBuf),
    /// The sandbox does not show this place.
    Unshown(PathBuf),
    /// It cannot be run.
    NoProgram(&'static str),
    /// Links lead in a circle.
    Circle,
}

impl Shown {
    /// What is wrong with a command, for people; nothing if it is a program.
    pub fn wrong(&self, command: &str) -> Option<String> {
        let found = match self.find(command) {
            Ok(found) => found?,
            Err(said) => return Some(said),
        };
        let interpreter = self.interpreter(&found)?;
        let said = self.find(&interpreter).err()?;
        Some(format!("`{command}`, a script that is to be run by {said}"))
    }

    /// The file of this machine that a command runs; nothing where that is not known.
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

    /// Follows a place in the sandbox to a program of this machine.
    fn program(&self, place: &Path) -> Result<Option<PathBuf>, Missing> {
        let Some(file) = self.follow(place)? else { return Ok(None) };
        let is = fs::metadata(&file).map_err(|_| Missing::Nothing(place.to_owned()))?;
        match is.permissions().mode() & 0o111 {
            _ if is.is_dir() => Err(Missing::NoProgram("a folder")),
            0 => Err(Missing::NoProgram("a file without the right to be run (chmod +x)")),
            _ => Ok(Some(file)),
        }
    }

    /// The file of this machine behind a place in the sandbox, by the links that the sandbox sees.
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
                // A folder that is there because something below it is.
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

    /// Who runs a script, by its first line.
    fn interpreter(&self, script: &Path) -> Option<String> {
        let mut first = Vec::new();
        let file = fs::File::open(script).ok()?;
        file.take(u64::try_from(FIRST_LINE).unwrap_or_default()).read_to_end(&mut first).ok()?;
        let line = first.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
        let line = std::str::from_utf8(line).ok()?.trim();
        let mut words = line.split_whitespace();
        let program = words.next()?.to_owned();
        // Who looks for it on PATH, as the sandbox has it.
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
                // Of a link the end counts: what is between may be links again.
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

/// What has to be shown for a program to run: what a `bin` lies in, since libraries lie beside it.
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
