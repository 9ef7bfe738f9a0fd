//! The table of commands.

/// What a command needs before it runs.
pub(super) struct Spec {
    pub(super) name: &'static str,
    /// Another name for it.
    pub(super) short: &'static str,
    /// The fewest words after the name.
    pub(super) least: usize,
    /// The most, if there is a limit.
    pub(super) most: Option<usize>,
    /// Options as `getopt` writes them.
    pub(super) letters: &'static str,
    /// The command line that people read.
    pub(super) arguments: &'static str,
    pub(super) what: &'static str,
    /// Needs an open image.
    pub(super) image: bool,
    /// Needs an image that may be written.
    pub(super) writes: bool,
}

const fn spec(name: &'static str, arguments: &'static str, what: &'static str) -> Spec {
    Spec {
        name,
        short: "",
        least: 0,
        most: Some(0),
        letters: "",
        arguments,
        what,
        image: true,
        writes: false,
    }
}

impl Spec {
    const fn words(mut self, least: usize, most: Option<usize>) -> Self {
        self.least = least;
        self.most = most;
        self
    }

    const fn short(mut self, short: &'static str) -> Self {
        self.short = short;
        self
    }

    const fn options(mut self, letters: &'static str) -> Self {
        self.letters = letters;
        self
    }

    const fn without_image(mut self) -> Self {
        self.image = false;
        self
    }

    const fn writing(mut self) -> Self {
        self.writes = true;
        self
    }

    /// One line of help.
    pub(super) fn line(&self) -> String {
        let gap = if self.arguments.is_empty() { "" } else { " " };
        format!("{}{gap}{} -- {}", self.name, self.arguments, self.what)
    }

    /// How many words are expected, for a message.
    pub(super) fn expected(&self) -> String {
        match self.most {
            None => format!("at least {}", self.least),
            Some(most) if most == self.least => most.to_string(),
            Some(most) => format!("between {} and {most}", self.least),
        }
    }
}

/// All commands, in the order of the alphabet.
pub(super) const COMMANDS: [Spec; 26] = [
    spec("abort", "", "ends the program with SIGABRT").without_image(),
    spec("aio_flush", "", "waits for all asynchronous requests"),
    spec(
        "aio_read",
        "[-Ciqv] [-P pattern] off len [len..]",
        "reads bytes, without waiting for the end",
    )
    .words(2, None)
    .options("CP:iqv"),
    spec(
        "aio_write",
        "[-Cfiquz] [-P pattern] off len [len..]",
        "writes bytes, without waiting for the end",
    )
    .words(2, None)
    .options("CfiP:quz")
    .writing(),
    spec(
        "alloc",
        "offset [count]",
        "says how many bytes are stored in this image itself",
    )
    .words(1, Some(2)),
    spec(
        "break",
        "event tag",
        "stops requests at an event (not supported by any image)",
    )
    .words(2, Some(2)),
    spec("close", "", "closes the image").short("c"),
    spec("discard", "[-Cq] off len", "gives the space of bytes back")
        .short("d")
        .words(2, None)
        .options("Cq")
        .writing(),
    spec("flush", "", "brings all writes to stable storage").short("f"),
    spec("help", "[command]", "explains one command, or lists all")
        .short("?")
        .words(0, Some(1))
        .without_image(),
    spec("info", "", "says what the image is").short("i"),
    spec("length", "", "says how long the disk is").short("l"),
    spec(
        "map",
        "",
        "lists which parts are stored in this image itself",
    ),
    spec(
        "open",
        "[-rsCnkU] [-t cache] [-d discard] [-i aio] [-o options] [path]",
        "opens an image",
    )
    .short("o")
    .words(1, None)
    .options("snCro:ki:t:d:U")
    .without_image(),
    spec("quit", "", "ends the program")
        .short("q")
        .without_image(),
    spec(
        "read",
        "[-abCqv] [-P pattern [-s off] [-l len]] off len",
        "reads bytes",
    )
    .short("r")
    .words(2, None)
    .options("abCl:pP:qs:v"),
    spec(
        "readv",
        "[-Cqv] [-P pattern] off len [len..]",
        "reads bytes into several buffers",
    )
    .words(2, None)
    .options("CP:qv"),
    spec("remove_break", "tag", "removes a stop").words(1, Some(1)),
    spec(
        "reopen",
        "[(-r|-w)] [-c cache] [-o options]",
        "changes how the image is open",
    )
    .words(0, None)
    .options("c:o:rw"),
    spec("resume", "tag", "lets a stopped request go on").words(1, Some(1)),
    spec("sigraise", "signal", "sends the program a signal")
        .words(1, Some(1))
        .without_image(),
    spec("sleep", "milliseconds", "waits").words(1, Some(1)),
    spec(
        "truncate",
        "[-m prealloc_mode] off",
        "changes the disk's length",
    )
    .short("t")
    .words(1, Some(3))
    .options("m:")
    .writing(),
    spec("wait_break", "tag", "waits for a request to be stopped").words(1, Some(1)),
    spec(
        "write",
        "[-bcCfnquz] [-P pattern | -s source_file] off len",
        "writes bytes",
    )
    .short("w")
    .words(2, None)
    .options("bcCfnpP:qs:uz")
    .writing(),
    spec(
        "writev",
        "[-Cfq] [-P pattern] off len [len..]",
        "writes bytes from several buffers",
    )
    .words(2, None)
    .options("CfP:q")
    .writing(),
];

/// Finds a command by either of its names.
pub(super) fn find(name: &str) -> Option<&'static Spec> {
    let named = |spec: &&Spec| spec.name == name || (!name.is_empty() && spec.short == name);
    COMMANDS.iter().find(named)
}
