// What the documentation shows of Apple's Vision, declared as Apple documents it, and the class that Xcode makes of a package. To compile only.
import CoreML
import Foundation

public typealias VNRequestCompletionHandler = (VNRequest, (any Error)?) -> Void

public class VNObservation: NSObject {}

public class VNClassificationObservation: VNObservation {
    public var identifier: String { fatalError("there is no Vision here") }
}

public class VNRequest: NSObject {
    public var results: [VNObservation]? { fatalError("there is no Vision here") }
}

public class VNCoreMLModel: NSObject {
    public init(for model: MLModel) throws { fatalError("there is no Vision here") }
}

public class VNCoreMLRequest: VNRequest {
    public init(model: VNCoreMLModel, completionHandler: VNRequestCompletionHandler? = nil) { fatalError("there is no Vision here") }
}

public class Classifier {
    public let model: MLModel

    public init(configuration: MLModelConfiguration = MLModelConfiguration()) throws { fatalError("there is no Vision here") }
}
