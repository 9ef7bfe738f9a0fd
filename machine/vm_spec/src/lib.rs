//! What a VM is: plain types that the command line, QMP and Domain XML all become.
